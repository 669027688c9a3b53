"""Speed and memory of converting checkpoints, on a synthetic AutoAWQ checkpoint with layers of Llama-2-7B's shapes.

    python benchmarks/convert.py WORKDIR --to compressed-tensors gptq-v2 mlx --out benchmarks/results/convert.json
    python benchmarks/convert.py WORKDIR --to compressed-tensors --envs ENVS

Every conversion is a process of its own on one worker thread (``--workers``), reading files that were just written; its
seconds are those of the conversion, without the start of Python. Where ``--envs`` has compressed-tensors
(``tests/interop/make_envs.sh ENVS compressed``), its own AutoAWQ converter is timed on the same checkpoint.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from shared import checkpoints, peers, running

from awq_jax import convert
from awq_jax.convert import registry
from awq_jax.convert.arrays import linear
from awq_jax.qtensor import QuantizedTensor

SHAPE = (4096, 11008, 32000)  # hidden, inner, vocabulary


def tensors(
    layers: int, hidden: int, inner: int, vocab: int, g: int
) -> Iterator[tuple[str, np.ndarray | QuantizedTensor]]:
    """Random weights in groups of ``g``, every zero point and code possible."""
    rng = np.random.default_rng(0)

    def packed(n: int, k: int) -> QuantizedTensor:
        return linear.build(
            rng.integers(0, 2**32, (k // 8, n), dtype=np.uint32),
            rng.uniform(0.002, 0.02, (k // g, n)).astype(np.float16),
            rng.integers(0, 16, (k // g, n)).astype(np.uint8),
            4, g, k, n, "float32",
        )  # fmt: skip

    yield "model.embed_tokens.weight", rng.normal(size=(vocab, hidden)).astype(np.float16)
    for i in range(layers):
        for name, n, k in checkpoints.linears(hidden, inner):
            yield f"model.layers.{i}.{name}.weight", packed(n, k)
        for name in ("input", "post_attention"):
            yield f"model.layers.{i}.{name}_layernorm.weight", np.ones(hidden, np.float16)
    yield "model.norm.weight", np.ones(hidden, np.float16)
    yield "lm_head.weight", rng.normal(size=(vocab, hidden)).astype(np.float16)


def work(source: Path, dst: Path, to: str, workers: int) -> running.Row:
    """One conversion."""
    result, cost = running.measured(
        convert.checkpoint, source, dst, to, workers=workers, allow_lossy=True, overwrite=True
    )
    megabytes = result.nbytes / 1e6
    return {
        "to": to, "workers": workers, "output_mb": round(megabytes), "seconds": round(cost.wall, 2),
        "cpu_seconds": round(cost.cpu, 2), "mb_per_second": round(megabytes / cost.wall),
        "mb_per_cpu_second": round(megabytes / cost.cpu), "peak_rss_mb": cost.peak_mb,
        "largest_deviation_steps": max((r.deviation for r in result.inexact), default=0.0),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> running.Row:
    parser = running.parser(__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--to", nargs="+", default=["compressed-tensors"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shape", type=int, nargs=3, metavar="N", default=SHAPE, help="hidden, inner, vocabulary")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    peers.add_envs(parser)
    args = parser.parse_args(arguments)
    source, theirs = args.workdir / "source", args.workdir / "peer"
    hidden, inner, vocab = args.shape
    if not source.exists():
        config = checkpoints.config(args.layers, hidden, inner, vocab, heads=32)
        made = tensors(args.layers, hidden, inner, vocab, args.group_size)
        convert.write_checkpoint(source, made, config, "gemm", max_shard_bytes=1 << 30)
    peer = peers.COMPRESSED_TENSORS
    missing = peer.missing(args.envs)
    rows: list[running.Row] = []
    for repeat in range(args.repeats):
        for to in args.to:
            dst = args.workdir / f"out{registry.FORMATS[to].suffix}"
            row, _ = running.apart(work, source, dst, to, args.workers)
            rows.append({"by": "awq_jax", "repeat": repeat, **row})
            print(rows[-1], flush=True)
        if not missing:
            shutil.rmtree(theirs, ignore_errors=True)
            said = running.json_of(peer.command(args.envs, source, theirs))
            rows.append({"by": peer.name, "repeat": repeat, **said})
            print(rows[-1], flush=True)
    result: running.Row = {"layers": args.layers, "group_size": args.group_size, **running.machine(), "rows": rows}
    return running.finish(result | {"skipped": {peer.name: missing} if missing else {}}, args.out)


def smoke(directory: Path) -> Iterator[list[str]]:
    tiny = ["--layers", "1", "--shape", "256", "256", "64", "--group-size", "64", "--repeats", "1"]
    yield [str(directory), "--to", "mlx", *tiny, "--envs", str(directory), "--out", str(directory / "r.json")]


if __name__ == "__main__":
    running.run(main, smoke)
