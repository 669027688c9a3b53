"""Perplexity lost by each method on a real model, and its divergence, calibrated and scored on disjoint text.

    python benchmarks/quality.py SmolLM2.gguf --text wiki.txt --bits 4 --group-size 64 --out results/quality.json

The text is tokenized once: the first ``samples x seq_len`` tokens calibrate, the last ``eval-tokens`` are scored.
Without ``--text`` the model samples its own text (two seeds), which is the only text a model of children's stories can
be judged on. The first of ``--methods`` is what the others are compared with; ``--settings KEY=VALUE ...`` are further
fields of `AwqConfig`. ``--two-streams`` adds the last method in one pass and in two streams as `Model.quantize` does
them, with the CPU seconds of all their work, and their differences in loss and in divergence over the same windows.
"""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from shared import checkpoints, running

import awq_jax
from awq_jax import evaluate
from awq_jax.config import METHOD_NAMES
from awq_jax.serve.model import Model
from awq_jax.serve.sampling import Sampling


class Reference(NamedTuple):
    """The float model, of which the quantized one is a copy with other parameters."""

    apply: Callable[..., jax.Array]
    params: Any


def self_sampled(model: Model, rows: int, length: int, seed: int) -> np.ndarray:
    """int32 ``[rows, length]``: tokens drawn from the model itself at temperature 1, from its bos token."""
    bos = int(model.hf_config.get("bos_token_id", 1))
    sampling = Sampling(temperature=1.0, seed=seed)
    drawn = model.generator.run(model.params, [[bos]] * rows, max_new_tokens=length - 1, sampling=sampling)
    return np.asarray([[bos, *row] for row in drawn], np.int32)


def texts(
    model: Model, text: Path | None, samples: int, length: int, eval_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens to calibrate on, ``[samples, length]``, and others to score: of a text, or of what the model writes."""
    if text:
        return checkpoints.split(model.tokenizer, text, samples, length, eval_tokens)
    written = self_sampled(model, eval_tokens // length, length, seed=2)
    return self_sampled(model, samples, length, seed=1), written[:, 1:].reshape(-1)  # windows have bos


def quality(
    model: str,
    *,
    text: Path | None = None,
    bits: int = 4,
    group_size: int = 64,
    samples: int = 32,
    seq_len: int = 512,
    eval_tokens: int = 20480,
    methods: tuple[str, ...] = METHOD_NAMES,
    settings: tuple[str, ...] = (),
    two_streams: bool = False,
) -> running.Row:
    """All methods on one model."""
    loaded = awq_jax.load(model)
    length = min(seq_len, loaded.config.max_length)
    calib, scored = texts(loaded, text, samples, length, eval_tokens)
    params = loaded.params
    before = evaluate.perplexity(loaded, scored, context=length)
    batches = [calib[i : i + 8] for i in range(0, len(calib), 8)]
    calibration, calibrating = running.measured(awq_jax.calibrate, loaded.apply, params, batches)
    asked = {"bits": bits, "group_size": group_size}
    rows: list[running.Row] = []
    plain: tuple[float, float] | None = None
    once: tuple[evaluate.Perplexity, evaluate.Divergence] | None = None
    ways: list[tuple[str, bool | None]] = [(m, None) for m in methods]
    ways += [(methods[-1], streams) for streams in (False, True) if two_streams]
    for method, streams in ways:
        chosen = {**asked, "explicit_scale": False, "method": method, **running.settings(settings)}
        start, began = time.perf_counter(), time.process_time()
        if streams is None:
            loaded.params, report = awq_jax.quantize(params, calibration, return_report=True, **chosen)
        else:
            loaded.params = params
            how: dict[str, Any] = {"samples": samples, "seq_len": length, "progress": False, "sequential": streams}
            report = loaded.quantize(calib, **how, **chosen)
        seconds, busy = time.perf_counter() - start, time.process_time() - began
        after = evaluate.perplexity(loaded, scored, context=length)
        lost, error = evaluate.difference(after, before)
        far = evaluate.kl(loaded, Reference(loaded.apply, params), scored, context=length)
        plain = plain or (lost, far.kl)
        rows.append(
            {"method": method, "ppl": after.ppl, "delta_nll": lost, "delta_nll_error": error, "kl": far.kl,
             "kl_error": far.standard_error, "seconds": round(seconds, 1), "vs_rtn": lost / plain[0],
             "kl_vs_rtn": far.kl / plain[1], "bits_per_weight": report.bits_per_weight}
        )  # fmt: skip
        if streams is not None:
            rows[-1] |= {"streams": 1 + streams, "cpu_seconds": round(busy, 1)}
            once = once or (after, far)
            rows[-1]["vs_one_pass"], rows[-1]["vs_one_pass_error"] = evaluate.difference(after, once[0])
            rows[-1]["kl_vs_one_pass"], rows[-1]["kl_vs_one_pass_error"] = evaluate.difference(far, once[1])
        print(rows[-1], flush=True)
    return {
        "model": Path(model).name,
        **asked,
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


def smoke(directory: Path) -> Iterator[list[str]]:
    model, _ = checkpoints.tiny(directory)
    quick = ["--samples", "2", "--seq-len", "16", "--eval-tokens", "32", "--group-size", "32", "--methods", "rtn"]
    yield [model, *quick, "--settings", "clip=False", "--out", str(directory / "r.json")]
    yield [model, *quick[:-1], "awq", "--two-streams", "--out", str(directory / "r.json")]


main = functools.partial(running.run, (quality,), smoke)

if __name__ == "__main__":
    main()
