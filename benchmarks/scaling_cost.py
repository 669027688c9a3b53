"""Processor seconds of each phase of quantizing one layer, against the operations counted in `scaling_flops`.

A checkpoint of two layers in Llama's proportions is quantized by the package's own `Session`. The first layer compiles
the programs, the second is measured: reading, calibration, search and rounding of each group, writing. Rates are fitted
to the smaller sizes, and the last is predicted from its counts alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

RATIO = 3.5  # Llama 2 and 3, 70B: inner size over hidden size
SAMPLES, LENGTH = 8, 512


def measure(directory: Path, hidden: int) -> dict[str, Any]:
    """In a process of its own."""
    import jax.numpy as jnp
    import scaling_flops
    import stream

    from awq_jax.devices import host_memory
    from awq_jax.models.weights import params as model_params
    from awq_jax.stream import job as stream_job
    from awq_jax.stream import parts as stream_parts

    shutil.rmtree(directory, ignore_errors=True)
    inner = int(hidden * RATIO)
    stream.make(directory, 2, hidden, inner, 1024, "float32")
    tokens = np.random.default_rng(1).integers(0, 1024, (SAMPLES, LENGTH)).astype(np.int32)
    job = stream_job.prepare(directory, directory.with_name("out"), tokens, stream_job.Options(seq_len=LENGTH), {})
    session, batches = job.session, len(job.batches)
    states, _ = job.open_hidden(0, None)
    marks: list[float] = []

    def timed(run: Callable[[], Any]) -> tuple[Any, float]:
        start = time.process_time()
        return run(), time.process_time() - start

    def tick() -> None:
        marks.append(time.process_time())
        trim()

    trim = host_memory.trim
    phases: dict[str, float] = {}
    with mock.patch.object(host_memory, "trim", tick):
        for block in session.blocks[:3]:
            tensors, phases["read"] = timed(
                lambda b=block: {p: list(job.weights.read(b.prefix + p)) for p in session.read_by(b)}
            )
            leaves = {p: job.weights.leaf(block.prefix + p, t) for p, t in tensors.items()}
            stats, phases["calibrate"] = timed(lambda b=block, w=leaves: session.calibrate(b, w, states, batches))
            marks.clear()
            done = session.quantize(block, leaves, stats)
            marks.append(time.process_time())
        made = list(model_params.tensors(done.leaves, session.chain.config))
        directory.with_name("part").mkdir(exist_ok=True)
        _, phases["write"] = timed(lambda: stream_parts.write_tensors(directory.with_name("part"), 0, made))
    groups = scaling_flops.shapes(session.work(block), lambda site: jnp.zeros(site.shape, jnp.float32))
    count = len(groups)
    spent = np.diff(marks)  # after each group's search, then after each one's rounding
    rows = []
    for i, g in enumerate(groups):
        find, cut = scaling_flops.search(g, job.settings), scaling_flops.pieces(g, job.settings)
        if i:  # the first group's search has no mark before it
            rows.append(_row("search", g, find, spent[i - 1]))
        rows.append(_row("round", g, scaling_flops.factor(g) + cut, spent[count - 1 + i]))
    work = scaling_flops.calibrate(groups, SAMPLES * LENGTH, LENGTH, hidden)
    rows.append(
        {"phase": "calibrate", "group": "all", "products": work.products, "numbers": 0, "cpu_s": phases["calibrate"]}
    )
    moved = {"read": block.elements * 4, "write": sum(f.stat().st_size for f in directory.with_name("part").iterdir())}
    shutil.rmtree(directory.with_name("part"))
    shutil.rmtree(directory)
    return {
        "hidden": hidden,
        "inner": inner,
        "tokens": SAMPLES * LENGTH,
        "rows": rows,
        "files": {k: {"bytes": n, "cpu_s": phases[k]} for k, n in moved.items()},
    }


def _row(phase: str, group: Any, work: Any, seconds: float) -> dict[str, Any]:
    found = {"phase": phase, "group": group.name.split("/", 2)[2], "k": group.k, "n": group.n, "pieces": group.pieces}
    return found | dataclasses.asdict(work) | {"cpu_s": float(seconds)}


KINDS = ("products", "factors", "numbers")


def fit(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Operations per processor second of each kind, in search and rounding together; and of calibration.

    Least squares of relative errors; in logarithms of the rates, which keeps them positive.
    """
    mine = [r for r in rows if r["phase"] != "calibrate"]
    counts = np.array([[r[k] for k in KINDS] for r in mine]) / np.array([r["cpu_s"] for r in mine])[:, None]
    rates = np.full(len(KINDS), np.log(counts.sum(axis=1).mean()))
    for _ in range(200):  # Gauss-Newton, damped
        parts = counts * np.exp(-rates)
        wrong = parts.sum(axis=1) - 1
        rates += np.linalg.solve(parts.T @ parts + 1e-3 * np.eye(len(KINDS)), parts.T @ wrong)
    rest = [r for r in rows if r["phase"] == "calibrate"]
    found = {f"{k}_per_s": float(np.exp(v)) for k, v in zip(KINDS, rates, strict=True)}
    return found | {"calibration_per_s": sum(r["products"] for r in rest) / sum(r["cpu_s"] for r in rest)}


def predict(row: dict[str, Any], rates: dict[str, float]) -> float:
    """Processor seconds."""
    if row["phase"] == "calibrate":
        return row["products"] / rates["calibration_per_s"]
    return sum(row[k] / rates[f"{k}_per_s"] for k in KINDS)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All sizes, each in a process of its own; the last is held out of the fit."""
    sizes = []
    for hidden in args.sizes:
        argv = [sys.executable, str(Path(__file__)), str(args.directory / "model"), str(hidden)]
        args.directory.mkdir(parents=True, exist_ok=True)
        out = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
        sizes.append(json.loads(out.splitlines()[-1]))
        print(hidden, {p: round(s, 2) for p, s in totals(sizes[-1]["rows"]).items()}, file=sys.stderr, flush=True)
    return summary(sizes)


def summary(sizes: list[dict[str, Any]]) -> dict[str, Any]:
    """What the sizes but the last say about the last."""
    rates = fit([r for s in sizes[:-1] for r in s["rows"]])
    held, first = sizes[-1], sizes[0]
    said: dict[str, float] = {}
    for r in held["rows"]:
        r["predicted_s"] = predict(r, rates)
        said[r["phase"]] = said.get(r["phase"], 0.0) + r["predicted_s"]
    took, before = totals(held["rows"]), totals(first["rows"])
    return {
        "rates": rates,
        "held_out": held["hidden"],
        "phases": {
            p: {"cpu_s": took[p], "predicted_s": said[p], "predicted_over_cpu": said[p] / took[p],
                "ratio_to_smallest": took[p] / before[p]} for p in took
        },
        "sizes": sizes,
    }  # fmt: skip


def totals(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Processor seconds by phase."""
    found: dict[str, float] = {}
    for r in rows:
        found[r["phase"]] = found.get(r["phase"], 0.0) + r["cpu_s"]
    return found


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
