"""What little calibration text, or text of another domain, does: against plain rounding, in one pass and two streams.

    python benchmarks/few_tokens.py stories15m --foreign wiki.txt --out results/few_tokens_stories15m.json

Cells are numbers of calibration tokens, of text that the model wrote itself and of ``--foreign``; and three tokens of
its own. All are scored on other text that the model wrote. No cell may be worse than rounding.
"""

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import quality
from shared import checkpoints, running

import awq_jax
from awq_jax import evaluate


def few_tokens(
    model: str,
    *,
    foreign: Path,
    bits: int = 3,
    group_size: int = 96,
    seq_len: int = 256,
    tokens: tuple[int, ...] = (256, 2048, 16384),
    eval_tokens: int = 10240,
    streams: tuple[int, ...] = (1, 2),
) -> running.Row:
    """All cells of one model."""
    loaded = awq_jax.load(model)
    params, most = loaded.params, max(tokens) // seq_len
    written = quality.self_sampled(loaded, most, seq_len, seed=1)
    scored = quality.self_sampled(loaded, max(1, eval_tokens // seq_len), seq_len, seed=2)[:, 1:].reshape(-1)
    other, _ = checkpoints.split(loaded.tokenizer, foreign, most, seq_len)
    cells = [(name, rows[: n // seq_len]) for n in tokens for name, rows in (("own", written), ("foreign", other))]
    cells.append(("own", written[:1, :3]))
    before = evaluate.perplexity(loaded, scored, context=seq_len)
    reference = quality.Reference(loaded.apply, params)
    plain: evaluate.Divergence | None = None
    out: list[running.Row] = []

    def measured(calib: np.ndarray | None, **settings: Any) -> running.Row:
        nonlocal plain
        loaded.params, began = params, time.process_time()
        rows: dict[str, Any] = {}
        if calib is not None:
            rows = {"calib": calib, "samples": len(calib), "seq_len": calib.shape[1]}
        how: dict[str, Any] = {"bits": bits, "group_size": group_size, "explicit_scale": False, "progress": False}
        report = loaded.quantize(**rows, **how, **settings)
        busy = time.process_time() - began
        lost, error = evaluate.difference(evaluate.perplexity(loaded, scored, context=seq_len), before)
        far = evaluate.kl(loaded, reference, scored, context=seq_len)
        plain = plain or far
        less, of_less = evaluate.difference(far, plain)
        return {
            "kl": far.kl, "kl_error": far.standard_error, "vs_rtn": far.kl / plain.kl, "kl_less_rtn": less,
            "kl_less_rtn_error": of_less, "delta_nll": lost, "delta_nll_error": error, "cpu_seconds": round(busy, 1),
            "rounded": sum("kept out" in row.reason for row in report.layers),
        }  # fmt: skip

    out.append({"text": "", "tokens": 0, "method": "rtn", **measured(None, method="rtn")})
    print(out[-1], flush=True)
    for name, calib in cells:
        for n in streams:
            found = measured(calib, sequential=n == 2)
            out.append({"text": name, "tokens": int(calib.size), "streams": n, **found})
            print(out[-1], flush=True)
    asked = {"model": Path(model).name, "bits": bits, "group_size": group_size, "scored_tokens": before.tokens}
    return {**asked, "rows": out, **running.machine()}


def smoke(directory: Path) -> Iterator[list[str]]:
    model, text = checkpoints.tiny(directory)
    quick = ["--seq-len", "16", "--tokens", "16", "--eval-tokens", "16", "--group-size", "32", "--streams", "1"]
    yield [model, "--foreign", text, *quick, "--out", str(directory / "r.json")]


main = functools.partial(running.run, (few_tokens,), smoke)

if __name__ == "__main__":
    main()
