"""Time and memory of quantizing a model, against the plain float forward pass over the same tokens.

    python benchmarks/speed.py MODEL --text wiki.txt --samples 8 32 128 --out benchmarks/results/speed.json

Every run is a process of its own (import, load, compile and work), one after the other on the same machine:
``forward`` computes the logits of all tokens with the float model under `jax.jit`; ``quantize`` calibrates on
them and quantizes. Both take four sequences at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

ROWS = 4


def work(args: argparse.Namespace) -> None:
    """One measured process: prints one JSON line."""
    start = time.perf_counter()
    import jax
    import numpy as np

    import awq_jax

    model = awq_jax.load(args.model)
    ids = np.asarray(model.tokenizer(Path(args.text).read_text())["input_ids"], np.int32)
    tokens = ids[: args.samples[0] * args.seq_len].reshape(args.samples[0], args.seq_len)
    batches = [tokens[i : i + ROWS] for i in range(0, len(tokens), ROWS)]
    out: dict[str, object] = {"work": args.work, "tokens": int(tokens.size), "jax": jax.__version__}
    if args.work == "forward":
        forward = jax.jit(lambda p, t: model.apply(p, t).max(axis=-1))
        for batch in batches:
            jax.block_until_ready(forward(model.params, batch))
    else:
        _, report = awq_jax.quantize(
            model.params, batches, apply_fn=model.apply, bits=args.bits, group_size=args.group_size,
            method=args.work, explicit_scale=False, progress=False, return_report=True,
        )  # fmt: skip
        out["seconds_by_phase"] = {k: round(v, 1) for k, v in report.seconds.items()}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    out["wall_seconds"] = round(time.perf_counter() - start, 1)
    out["cpu_seconds"] = round(usage.ru_utime + usage.ru_stime, 1)
    out["peak_rss_mb"] = usage.ru_maxrss // 1024
    print(json.dumps(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--method", default="awq+gptq")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.work:
        return work(args)
    rows = []
    for samples in args.samples:
        for kind in ("forward", args.method):
            command = [sys.executable, __file__, args.model, "--text", args.text, "--work", kind]
            command += ["--samples", str(samples), "--seq-len", str(args.seq_len)]
            command += ["--bits", str(args.bits), "--group-size", str(args.group_size)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"samples": samples, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
        forward, quantize = rows[-2:]
        quantize["wall_vs_forward"] = round(quantize["wall_seconds"] / forward["wall_seconds"], 2)
        quantize["cpu_vs_forward"] = round(quantize["cpu_seconds"] / forward["cpu_seconds"], 2)
        phases = quantize["seconds_by_phase"]
        quantize["search_vs_forward"] = round((phases["search"] + phases["round"]) / forward["wall_seconds"], 2)
    result = {
        "model": Path(args.model).name, "bits": args.bits, "group_size": args.group_size, "method": args.method,
        "cores": os.cpu_count(), "machine": platform.machine(), "rows": rows,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
