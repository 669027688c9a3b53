"""Perplexity lost by each method on a real model, calibrated and scored on disjoint text.

    python benchmarks/quality.py SmolLM2.gguf --text wiki.txt --bits 4 --group-size 64 --out results/quality.json

The text is tokenized once: the first ``samples x seq_len`` tokens calibrate, the last
``eval-tokens`` are scored. Without ``--text`` the model samples its own text (two seeds), which is the
only text a model of children's stories can be judged on.
"""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from shared import checkpoints, running

import awq_jax
from awq_jax import evaluate
from awq_jax.config import METHOD_NAMES
from awq_jax.serve.model import Model
from awq_jax.serve.sampling import Sampling


def self_sampled(model: Model, rows: int, length: int, seed: int) -> np.ndarray:
    """int32 ``[rows, length]``: tokens drawn from the model itself at temperature 1, from its bos token."""
    bos = int(model.hf_config.get("bos_token_id", 1))
    drawn = model.generator.run(
        model.params,
        [[bos]] * rows,
        max_new_tokens=length - 1,
        sampling=Sampling(temperature=1.0),
        seed=seed,
    )
    return np.asarray([[bos, *row] for row in drawn], np.int32)


def main(arguments: Sequence[str] | None = None) -> running.Row:
    parser = running.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, help="calibration and evaluation text; default: sampled from the model")
    parser.add_argument("--eval-text", type=Path, help="another text to score, instead of the end of --text")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=20480)
    parser.add_argument("--methods", nargs="+", default=METHOD_NAMES, help="the first is compared with")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="further AwqConfig fields")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)

    model = awq_jax.load(args.model)
    length = min(args.seq_len, model.config.max_length)
    if args.text:
        ends = 0 if args.eval_text else args.eval_tokens
        calib, scored = checkpoints.split(model, args.text, args.samples, length, ends)
        if args.eval_text:
            scored = checkpoints.token_ids(model, args.eval_text)[: args.eval_tokens]
    else:
        calib = self_sampled(model, args.samples, length, seed=1)
        scored = self_sampled(model, args.eval_tokens // length, length, seed=2).reshape(-1)
    params = model.params
    before = evaluate.perplexity(model, scored, context=length)
    batches = [calib[i : i + 8] for i in range(0, len(calib), 8)]
    calibration, calibrating = running.measured(awq_jax.calibrate, model.apply, params, batches)
    extra = {key: json.loads(value) for key, value in (item.split("=", 1) for item in args.set)}
    rows: list[running.Row] = []
    plain = 0.0
    for method in args.methods:
        settings = {
            "bits": args.bits,
            "group_size": args.group_size,
            "explicit_scale": False,
            "method": method,
            **extra,
        }
        start = time.perf_counter()
        model.params, report = awq_jax.quantize(params, calibration, return_report=True, **settings)
        seconds = time.perf_counter() - start
        after = evaluate.perplexity(model, scored, context=length)
        lost = after.nll - before.nll
        plain = plain or lost
        rows.append(
            {"method": method, "ppl": after.ppl, "delta_nll": lost, "seconds": round(seconds, 1),
             "vs_rtn": lost / plain, "bits_per_weight": report.bits_per_weight}
        )  # fmt: skip
        print(rows[-1], flush=True)
    result: running.Row = {
        "model": Path(args.model).name,
        "bits": args.bits,
        "group_size": args.group_size,
        "calibration_tokens": int(calib.size),
        "scored_tokens": before.tokens,
        "float_ppl": before.ppl,
        "standard_error": before.standard_error,
        "calibrate_seconds": round(calibrating.wall, 1),
        "rows": rows,
        "peak_rss_mb": running.spent().peak_mb,
        "device": str(jax.devices()[0]),
        **running.machine(),
    }
    return running.finish(result, args.out)


def smoke(directory: Path) -> Iterator[list[str]]:
    model = checkpoints.make(directory / "model")
    tiny = ["--samples", "2", "--seq-len", "16", "--eval-tokens", "32", "--group-size", "32"]
    yield [str(model), *tiny, "--methods", "rtn", "--set", "clip=false", "--out", str(directory / "r.json")]


if __name__ == "__main__":
    running.run(main, smoke)
