"""Perplexity lost by each method on a real model, calibrated and scored on disjoint text.

    python benchmarks/quality.py SmolLM2.gguf --text wiki.txt --bits 4 --group-size 64 --out results/quality.json

The text is tokenized once: the first ``samples x seq_len`` tokens calibrate, the last
``eval-tokens`` are scored. Without ``--text`` the model samples its own text (two seeds), which is the
only text a model of children's stories can be judged on.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from pathlib import Path

import jax
import numpy as np

import awq_jax
from awq_jax import evaluate
from awq_jax.serve.model import Model
from awq_jax.serve.sampling import Sampling


def self_sampled(model: Model, rows: int, length: int, seed: int) -> np.ndarray:
    """``[rows, length]`` tokens drawn from the model itself at temperature 1, from its bos token."""
    bos = int(model.hf_config.get("bos_token_id", 1))
    out = [[bos] for _ in range(rows)]

    def keep(row: int, token: int) -> bool:
        out[row].append(token)
        return False

    model.generator.run(
        model.params,
        [[bos]] * rows,
        max_new_tokens=length - 1,
        sampling=Sampling(temperature=1.0),
        seed=seed,
        on_token=keep,
    )
    return np.asarray(out, np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", help="calibration and evaluation text; default: sampled from the model")
    parser.add_argument("--eval-text", help="another text to score, instead of the end of --text")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=20480)
    parser.add_argument("--methods", nargs="+", default=["rtn", "awq", "awq+gptq"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="further AwqConfig fields")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    model = awq_jax.load(args.model)
    length = min(args.seq_len, model.config.max_length)
    if args.text:
        ids = np.asarray(model.tokenizer(Path(args.text).read_text())["input_ids"], np.int32)
        calib = ids[: args.samples * length].reshape(args.samples, length)
        scored = ids[-args.eval_tokens :]
        if args.eval_text:
            scored = np.asarray(model.tokenizer(Path(args.eval_text).read_text())["input_ids"], np.int32)[
                : args.eval_tokens
            ]
        elif len(ids) < calib.size + args.eval_tokens:
            raise SystemExit(f"{args.text} has {len(ids)} tokens: calibration and evaluation would overlap")
    else:
        calib = self_sampled(model, args.samples, length, seed=1)
        scored = self_sampled(model, args.eval_tokens // length, length, seed=2).reshape(-1)
    params = model.params
    before = evaluate.perplexity(model, scored, context=length)
    batches = [calib[i : i + 8] for i in range(0, len(calib), 8)]
    start = time.perf_counter()
    calibration = awq_jax.calibrate(model.apply, params, batches)
    calibrated = time.perf_counter() - start
    rows = []
    for method in args.methods:
        start = time.perf_counter()
        extra = {k: json.loads(v) for k, v in (s.split("=", 1) for s in args.set)}
        model.params, report = awq_jax.quantize(
            params,
            calibration,
            bits=args.bits,
            group_size=args.group_size,
            method=method,
            explicit_scale=False,
            return_report=True,
            **extra,
        )
        seconds = time.perf_counter() - start
        after = evaluate.perplexity(model, scored, context=length)
        rows.append(
            {"method": method, "ppl": after.ppl, "delta_nll": after.nll - before.nll, "seconds": round(seconds, 1)}
        )
        rows[-1]["vs_rtn"] = rows[-1]["delta_nll"] / rows[0]["delta_nll"]
        rows[-1]["bits_per_weight"] = report.bits_per_weight
        print(rows[-1], flush=True)
    result = {
        "model": Path(args.model).name,
        "bits": args.bits,
        "group_size": args.group_size,
        "calibration_tokens": int(calib.size),
        "scored_tokens": before.tokens,
        "float_ppl": before.ppl,
        "standard_error": before.standard_error,
        "calibrate_seconds": round(calibrated, 1),
        "rows": rows,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "jax": jax.__version__,
        "device": str(jax.devices()[0]),
        "machine": platform.machine(),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
