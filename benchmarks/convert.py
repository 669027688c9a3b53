"""Speed and memory of converting checkpoints, on a synthetic AutoAWQ checkpoint with layers of Llama-2-7B's shapes.

    python benchmarks/convert.py WORKDIR --to compressed-tensors gptq-v2 mlx --out benchmarks/results/convert.json
    python benchmarks/convert.py WORKDIR --to compressed-tensors --envs ENVS

Every conversion is a process of its own on one worker thread, reading files that were just written; its
seconds are those of the conversion, without the start of Python. Where ``--envs`` has compressed-tensors
(``tests/interop/make_envs.sh ENVS compressed``), its own AutoAWQ converter is timed on the same checkpoint. ``--shape``
is the hidden size, the inner one, and the vocabulary.
"""

import functools
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from shared import checkpoints, peers, running

from awq_jax import convert as library
from awq_jax.convert import registry
from awq_jax.convert.arrays import linear
from awq_jax.qtensor import QuantizedTensor


def make(directory: Path, g: int, layers: int, hidden: int, inner: int, vocab: int) -> None:
    """Random weights in groups of ``g``, every zero point and code possible."""
    rng = np.random.default_rng(0)

    def tensor(*shape: int) -> np.ndarray | QuantizedTensor:
        return (rng.normal(size=shape) if len(shape) > 1 else np.ones(shape)).astype(np.float16)

    def packed(n: int, k: int) -> np.ndarray | QuantizedTensor:
        return linear.build(
            rng.integers(0, 2**32, (k // 8, n), dtype=np.uint32),
            rng.uniform(0.002, 0.02, (k // g, n)).astype(np.float16),
            rng.integers(0, 16, (k // g, n)).astype(np.uint8),
            4, g, k, n, "float32",
        )  # fmt: skip

    config = checkpoints.config(layers, hidden, inner, vocab, heads=32)
    tensors = checkpoints.named(layers, hidden, inner, vocab, tensor, packed)
    library.write_checkpoint(directory, tensors, config, "gemm", max_shard_bytes=1 << 30)


def work(source: Path, dst: Path, to: str) -> running.Row:
    """One conversion."""
    result, cost = running.measured(library.checkpoint, source, dst, to, workers=1, allow_lossy=True, overwrite=True)
    megabytes = result.nbytes / 1e6
    return {
        "to": to, "workers": 1, "output_mb": round(megabytes), "seconds": round(cost.wall, 2),
        "cpu_seconds": round(cost.cpu, 2), "mb_per_second": round(megabytes / cost.wall),
        "mb_per_cpu_second": round(megabytes / cost.cpu), "peak_rss_mb": cost.peak_mb,
        "largest_deviation_steps": max((r.deviation for r in result.inexact), default=0.0),
    }  # fmt: skip


def convert(
    workdir: Path,
    *,
    to: tuple[str, ...] = ("compressed-tensors",),
    layers: int = 8,
    shape: tuple[int, ...] = (4096, 11008, 32000),
    group_size: int = 128,
    repeats: int = 3,
    envs: Path = peers.ENVS,
) -> running.Row:
    """Each format in turn, and the peer."""
    source, theirs = workdir / "source", workdir / "peer"
    if not source.exists():
        make(source, group_size, layers, *shape)
    peer = peers.COMPRESSED_TENSORS
    missing = peer.missing(envs)
    rows: list[running.Row] = []
    for repeat in range(repeats):
        for name in to:
            dst = workdir / f"out{registry.FORMATS[name].suffix}"
            row, _ = running.apart(work, source, dst, name)
            rows.append({"by": "awq_jax", "repeat": repeat, **row})
            print(rows[-1], flush=True)
        if not missing:
            shutil.rmtree(theirs, ignore_errors=True)
            said = subprocess.check_output(peer.command(envs, source, theirs), text=True)
            rows.append({"by": peer.name, "repeat": repeat, **json.loads(said.splitlines()[-1])})
            print(rows[-1], flush=True)
    skipped = {peer.name: missing} if missing else {}
    return {"layers": layers, "group_size": group_size, **running.machine(), "rows": rows, "skipped": skipped}


def smoke(directory: Path) -> Iterator[list[str]]:
    tiny = ["--layers", "1", "--shape", "256", "256", "64", "--group-size", "64", "--repeats", "1"]
    yield [str(directory), "--to", "mlx", *tiny, "--envs", str(directory), "--out", str(directory / "r.json")]


main = functools.partial(running.run, (convert,), smoke)

if __name__ == "__main__":
    main()
