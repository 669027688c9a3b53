"""Decoding on this machine: packed weights, with and without the float copy, against a float model.

    python benchmarks/decode.py --shape llama-100m --out benchmarks/results/decode-cpu.json
    python benchmarks/decode.py --model SmolLM2-135M-Instruct.Q4_1.gguf

Every row is a process of its own, so that its peak memory is its own: ``dense`` is the float32 model,
``packed`` what `generate` does unasked, ``packed-only`` with ``resident=False``, ``packed-unmerged`` also with
``merge=False``. With ``--model`` all serve that file's weights (``dense``: dequantized when loaded) with the
whole of `generate` timed, prompt and sampling included; runs go round ``--rounds`` times, and the fastest counts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

KINDS: dict[str, dict[str, bool]] = {
    "dense": {},
    "packed": {},
    "packed-only": {"resident": False},
    "packed-unmerged": {"resident": False, "merge": False},
}


def work(args: argparse.Namespace) -> None:
    """One measured process: prints one JSON line."""
    import jax

    row: dict[str, object]
    if args.model:
        import awq_jax
        from awq_jax.kernels.resident import resident
        from awq_jax.sampling import Sampling

        model = awq_jax.load(args.model, dtype="float32", **KINDS[args.work])
        if args.work == "dense":
            model.params = resident(model.params)
        generator, params = model._weights.serving()
        best = float("inf")
        for repeat in range(4):
            start = time.perf_counter()
            out = generator.run(params, [[1] * 16], max_new_tokens=args.steps, sampling=Sampling())
            best = min(best, time.perf_counter() - start) if repeat else best
        row = {"tokens_per_second": len(out[0]) / best, "served": model.explain()}
    else:
        from awq_jax import bench_decode

        full = bench_decode.decode(
            args.shape, packed=args.work != "dense", dtype="float32", steps=args.steps, context=16, **KINDS[args.work]
        )
        keep = ("tokens_per_second", "ms_per_step", "weight_bytes", "bandwidth", "floor_share", "served")
        row = {key: full[key] for key in keep}
    row["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"kind": args.work, "jax": jax.__version__, **row}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-100m", help="a name in awq_jax.bench_decode.SHAPES")
    parser.add_argument("--model", help="measure this model instead")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.work:
        return work(args)
    best: dict[str, dict[str, object]] = {}
    for _ in range(args.rounds):
        for kind in args.kinds:
            command = [sys.executable, __file__, "--work", kind, "--shape", args.shape, "--steps", str(args.steps)]
            command += ["--model", args.model] if args.model else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            if kind not in best or row["tokens_per_second"] > best[kind]["tokens_per_second"]:
                best[kind] = row
            print(row, flush=True)
    for row in best.values() if "dense" in best else ():
        row["vs_dense"] = row["tokens_per_second"] / best["dense"]["tokens_per_second"]  # type: ignore[operator]
    name = Path(args.model).name if args.model else args.shape
    result = {"model": name, "cores": os.cpu_count(), "steps": args.steps, "rows": list(best.values())}
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
