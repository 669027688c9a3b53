"""Everything that needs a CUDA card, in one command of under ten minutes.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/gpu.py --out benchmarks/results/

Checks each kernel on fresh random data, measures products against XLA in bfloat16 and other libraries, decodes
a model of Llama 3's shape with float and packed weights, and tunes the tile sizes with what time is left. Results
are written after each part, so that a run cut short keeps what it has: ``gpu_<chip>.json``, and ``tuned_<chip>.json``
to be copied to ``kernels/tuned/<chip>.json``. ``--cpu`` rehearses it in small on a machine without a card.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room on the card too

FIRST = ((8192, 8192), (4096, 14336))  # what the targets are about
THEN = ((14336, 4096), (8192, 28672))


def correctness(seed: int) -> list[dict[str, Any]]:
    """Each kernel over groups, bits, dtypes and odd numbers of rows, against float64 in NumPy."""
    import jax
    import jax.numpy as jnp

    from awq_jax.bench import products
    from awq_jax.kernels import triton_matmul, tuned

    chip = tuned.local_chip()
    out = []
    cases = [
        (m, k, n, g, bits, dtype, kernel)
        for kernel, rows in (("mma", (1, 5, 16, 33, 130)), ("gemv", (1, 3)))
        for m in rows
        for k, n, g, bits, dtype in (
            (1024, 512, 128, 4, "bfloat16"), (576, 200, 64, 4, "float16"), (1056, 264, 32, 4, "bfloat16"),
            (640, 256, 640, 8, "bfloat16"), (512, 136, 64, 8, "float16"),
        )
    ]  # fmt: skip
    for i, (m, k, n, g, bits, dtype, kernel) in enumerate(cases):
        w = products.weight(seed + i, k, n, g, bits)
        x = jax.random.normal(jax.random.key(seed + i), (m, k), dtype)
        rows = 8 if m <= 8 else 16 if m <= 16 else 64
        config = tuned.Config(kernel, block_m=rows, block_n=64, late=m <= 16, stages=3)
        if chip is None:
            y = jnp.dot(x, w.ready.dequantize(dtype))
        else:
            y = jax.jit(lambda x, q, c=config: triton_matmul.matmul(x, q, x.dtype, chip=chip, config=c))(x, w.ready)
        wrong = products.error(y, x, w.canonical, seed)
        out.append({"m": m, "k": k, "n": n, "group_size": g, "bits": bits, "dtype": dtype, "kernel": kernel,
                    "error": wrong, "correct": wrong < products.LIMIT})  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop starting new work after so long")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--cpu", action="store_true", help="rehearse in small, without a card")
    args = parser.parse_args()
    start = time.monotonic()
    from awq_jax.bench import decoding, products, timing
    from awq_jax.commands.bench import device
    from awq_jax.kernels import triton_matmul, tuned

    chip = tuned.local_chip()
    if chip is None and not args.cpu:
        raise SystemExit("no NVIDIA GPU here; --cpu rehearses without one")
    slug = chip.slug if chip else "cpu"
    result: dict[str, Any] = device() | {
        "seed": args.seed, "chip": dataclasses.asdict(chip) if chip else None, "triton": triton_matmul.unavailable(),
        "correctness": [], "kernels": [], "decode": [], "failures": [],
    }  # fmt: skip

    def left(share: float) -> bool:
        """Whether less than ``share`` of the time is over."""
        return time.monotonic() - start < 60 * args.minutes * share

    def save() -> None:
        result["seconds"] = round(time.monotonic() - start, 1)
        (args.out / f"gpu_{slug}.json").write_text(json.dumps(result, indent=1) + "\n")

    def part(name: str, work: Any) -> None:
        try:
            work()
        except Exception:  # one part that fails must not cost the others
            result["failures"].append({"part": name, "error": traceback.format_exc()[-2000:]})
            print(f"{name} FAILED: {result['failures'][-1]['error'][-300:]}", flush=True)
        save()
        print(f"-- {name} done after {time.monotonic() - start:.0f} s", flush=True)

    top = timing.ceilings(1.0 if chip else 0.01)
    result["ceilings"] = dataclasses.asdict(top)
    print(f"copy {top.bandwidth / 1e9:.0f} GB/s, bfloat16 {top.flops / 1e12:.1f} TFLOP/s", flush=True)

    def check() -> None:
        result["correctness"] = correctness(args.seed)
        wrong = [c for c in result["correctness"] if not c["correct"]]
        print(f"{len(result['correctness']) - len(wrong)} of {len(result['correctness'])} products correct", flush=True)
        for c in wrong:
            print("WRONG", c, flush=True)

    def measure(shapes: Any, until: float) -> None:
        rows = products.ROWS if chip else (1, 16)
        for row in products.measure(shapes, rows, 128, 4, top, seconds=0.1, seed=args.seed):
            result["kernels"].append(row)
            print(products.line(row), flush=True)
            if not left(until):
                return

    def decode() -> None:
        for bits in (4, None):
            row = decoding.run("llama-3-8b" if chip else "small", bits, top, context=512 if chip else 16)
            result["decode"].append(row)
            print(decoding.line(row), flush=True)

    def tune() -> None:
        entries = []
        for shape in (*FIRST, *THEN):
            for entry in products.tune([shape], (1, 16, 64, 256), 128, 4, chip, seconds=0.05, say=print):
                entries.append(entry)
                table = products.table(chip, entries)
                (args.out / f"tuned_{slug}.json").write_text(json.dumps(table, indent=1) + "\n")
                if not left(0.97):
                    return

    args.out.mkdir(parents=True, exist_ok=True)
    part("correctness", check)
    part("products", lambda: measure(FIRST if chip else ((256, 256),), 0.45))
    if left(0.5):
        part("decode", decode)
    if chip and left(0.7):
        part("tune", tune)
    if chip and left(0.8):
        part("more products", lambda: measure(THEN, 0.95))
    for row in result["kernels"]:
        print(products.line(row))
    for row in result["decode"]:
        print(decoding.line(row))


if __name__ == "__main__":
    main()
