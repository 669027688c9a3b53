"""Speed and memory of converting checkpoints, on a synthetic AutoAWQ checkpoint with layers of Llama-2-7B's shapes.

    python benchmarks/convert.py WORKDIR --to compressed-tensors gptq mlx float --out benchmarks/results/convert.json
    python benchmarks/convert.py WORKDIR --to compressed-tensors --peer PYTHON_OF_COMPRESSED_TENSORS

Every conversion is a process of its own on one worker thread (``--workers``), reading files that were just written.
``--peer`` also times compressed-tensors' own AutoAWQ converter on the same checkpoint, in the same run
(``convert_peer_driver.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax import convert
from awq_jax.convert import registry
from awq_jax.convert.arrays import linear

WIDTH, INNER, VOCAB, GROUP = 4096, 11008, 32000, 128


def packed(rng: np.random.Generator, k: int, n: int) -> Any:
    """A random weight, every zero point and code possible."""
    return linear.build(
        rng.integers(0, 2**32, (k // 8, n), dtype=np.uint32),
        rng.uniform(0.002, 0.02, (k // GROUP, n)).astype(np.float16),
        rng.integers(0, 16, (k // GROUP, n)).astype(np.uint8),
        4, GROUP, k, n, "float32",
    )  # fmt: skip


def tensors(layers: int) -> Iterator[tuple[str, Any]]:
    rng = np.random.default_rng(0)
    yield "model.embed_tokens.weight", rng.normal(size=(VOCAB, WIDTH)).astype(np.float16)
    for i in range(layers):
        prefix = f"model.layers.{i}"
        for name in ("q", "k", "v", "o"):
            yield f"{prefix}.self_attn.{name}_proj.weight", packed(rng, WIDTH, WIDTH)
        for name, k, n in (("gate", WIDTH, INNER), ("up", WIDTH, INNER), ("down", INNER, WIDTH)):
            yield f"{prefix}.mlp.{name}_proj.weight", packed(rng, k, n)
        for name in ("input", "post_attention"):
            yield f"{prefix}.{name}_layernorm.weight", np.ones(WIDTH, np.float16)
    yield "model.norm.weight", np.ones(WIDTH, np.float16)
    yield "lm_head.weight", rng.normal(size=(VOCAB, WIDTH)).astype(np.float16)


def config(layers: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": layers, "vocab_size": VOCAB,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip


def work(args: argparse.Namespace) -> None:
    """One measured process: prints one JSON line."""
    start, cpu = time.perf_counter(), time.process_time()
    suffix = registry.FORMATS[args.to[0]].suffix
    dst = Path(args.workdir) / f"out{suffix}"
    result = convert.checkpoint(
        Path(args.workdir) / "source", dst, args.to[0], workers=args.workers, allow_lossy=True, overwrite=True
    )
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    status = Path("/proc/self/status").read_text()  # getrusage would give the parent's peak, kept across exec
    peak = int(status.split("VmHWM:")[1].split()[0])
    row = {
        "to": args.to[0], "workers": args.workers, "output_mb": round(result.nbytes / 1e6),
        "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2),
        "mb_per_second": round(result.nbytes / 1e6 / seconds),
        "mb_per_cpu_second": round(result.nbytes / 1e6 / cpu), "peak_rss_mb": peak // 1024,
        "largest_deviation_steps": max((r.deviation for r in result.inexact), default=0.0),
    }  # fmt: skip
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--to", nargs="+", default=["compressed-tensors"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", help="a Python with compressed-tensors, to time its converter too")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.work:
        return work(args)
    source = args.workdir / "source"
    if not source.exists():
        convert.write_checkpoint(source, tensors(args.layers), config(args.layers), "gemm", max_shard_bytes=1 << 30)
    rows: list[dict[str, Any]] = []
    for repeat in range(args.repeats):
        for to in args.to:
            command = [sys.executable, __file__, str(args.workdir), "--work", "--to", to]
            command += ["--workers", str(args.workers)]
            rows.append({"by": "awq_jax", "repeat": repeat, **_json(command)})
            print(rows[-1], flush=True)
        if args.peer:
            shutil.rmtree(args.workdir / "peer", ignore_errors=True)
            driver = Path(__file__).with_name("convert_peer_driver.py")
            row = _json([args.peer, str(driver), str(source), str(args.workdir / "peer")])
            rows.append({"by": "compressed-tensors", "repeat": repeat, **row})
            print(rows[-1], flush=True)
    result = {
        "layers": args.layers, "group_size": GROUP, "cores": os.cpu_count(), "machine": platform.machine(),
        "numpy": np.__version__, "rows": rows,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def _json(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
