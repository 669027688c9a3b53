"""Calibration of a layer on several devices and processes: what it costs, and what it moves.

    python benchmarks/stream.py make DIR --layers 3 --hidden 1024 --inner 2816 --vocab 2048 --dtype float32
    python benchmarks/devices.py DIR --out benchmarks/results/devices_cpu.json

On a CPU devices are simulated: they share its cores, so that more of them cannot take less time, and what is
to be seen is how much more processor time the same work takes (the copies, the all-to-all, the waiting). On
GPUs the seconds are those of the devices. The first layer, which compiles, is left out. Each line carries a
digest of the last layer's Grams, which must be the same for all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def measure(directory: Path, samples: int, length: int, rank: int, size: int, port: int) -> dict[str, Any]:
    """In a process whose devices are all to be used."""
    from awq_jax.devices import team as processes

    if size > 1:
        processes.join(f"127.0.0.1:{port}", size, rank)
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from awq_jax.devices.pool import pool_of
    from awq_jax.stream import job as stream_job
    from awq_jax.stream import run

    vocab = json.loads((directory / "config.json").read_text())["vocab_size"]
    tokens = np.random.default_rng(1).integers(0, vocab, (samples, length)).astype(np.int32)
    devices = jax.devices()
    mesh = Mesh(np.asarray(devices), ("d",)) if len(devices) > 1 else None
    with processes.team() as team:
        pool = pool_of(mesh, team)
        options = stream_job.Options(seq_len=length, batch_size=1)
        job = stream_job.prepare(directory, directory.with_name("nothing"), tokens, options, {}, pool)
        blocks = [b for b in job.session.blocks if b.name == "embed" or b.name.startswith("layers/")]
        hidden, _ = job.open_hidden(0, None)
        wall, used = [], []
        with run.Reader(job, blocks) as reader:
            for block in blocks:
                leaves = reader(block)
                pool.meet()
                start, cpu = time.perf_counter(), time.process_time()
                stats = job.session.calibrate(block, leaves, hidden, samples)
                wall.append(time.perf_counter() - start)
                used.append(time.process_time() - cpu)
        digest = hashlib.sha256()
        grams = 0
        for name in stats:
            gram = np.asarray(stats[name].gram)
            grams += gram.nbytes
            digest.update(gram.tobytes())
        cpus = [float(t) for t in pool.meet(str(sum(used[2:]) / len(used[2:])))]
    d = pool.size
    rounds = -(-samples // d)
    return {
        "processes": size,
        "devices": d,
        "kind": devices[0].device_kind,
        "wall_s_per_layer": sum(wall[2:]) / len(wall[2:]),
        "cpu_s_per_layer": sum(cpus),
        "gram_bytes_per_layer": grams,
        "bytes_moved_per_layer": rounds * (d - 1) * grams,
        "bytes_moved_per_device_and_batch": grams * (d - 1) // d if d > 1 else 0,
        "tokens": samples * length,
        "grams": digest.hexdigest()[:16],
    }


def launch(args: argparse.Namespace, devices: int, size: int) -> dict[str, Any]:
    """``size`` processes of ``devices`` devices each."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    running = []
    for rank in range(size):
        argv = [sys.executable, __file__, str(args.directory), "--rank", str(rank), "--size", str(size)]
        argv += ["--port", str(port), "--samples", str(args.samples), "--seq-len", str(args.seq_len)]
        running.append(subprocess.Popen(argv, env=os.environ | {"XLA_FLAGS": flags}, stdout=subprocess.PIPE, text=True))
    outputs = [p.communicate()[0] for p in running]
    if any(p.returncode for p in running):
        raise SystemExit(f"failed: {outputs}")
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--samples", type=int, default=16, help="batches of one row")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.rank is not None:
        found = measure(args.directory, args.samples, args.seq_len, args.rank, args.size, args.port)
        print(json.dumps(found), flush=True)
        return
    rows = []
    for devices, size in ((1, 1), (2, 1), (4, 1), (8, 1), (4, 2)):
        row = launch(args, devices, size)
        row["cpu_over_one_device"] = row["cpu_s_per_layer"] / (rows[0] if rows else row)["cpu_s_per_layer"]
        rows.append(row)
        print(row, flush=True)
    result = {
        "command": f"python benchmarks/devices.py DIR --samples {args.samples} --seq-len {args.seq_len}",
        "checkpoint": json.loads((args.directory / "config.json").read_text()),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "same_grams": len({r["grams"] for r in rows}) == 1,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
