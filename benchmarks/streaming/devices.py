"""Calibration of a layer on several devices and processes: what it costs, and what it moves.

On a CPU devices are simulated: they share its cores, so that more of them cannot take less time, and what is
to be seen is how much more processor time the same work takes (the copies, the all-to-all, the waiting). On
GPUs the seconds are those of the devices. The first layer, which compiles, is left out. Each row carries a
digest of the last layer's Grams, which must be the same for all.
"""

import hashlib
import json
import multiprocessing
import os
import socket
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh
from shared import checkpoints, running

from awq_jax.devices import team as processes
from awq_jax.devices.pool import pool_of
from awq_jax.stream.job import Options, prepare
from awq_jax.stream.run import BlockReader

Measured = dict[str, int | float | str]


def measure(checkpoint: Path, samples: int, length: int, rank: int, size: int, port: int) -> Measured:
    """In a process whose devices are all to be used."""
    if size > 1:
        processes.join(f"127.0.0.1:{port}", size, rank)
    tokens = checkpoints.random_tokens(checkpoints.hf_config(checkpoint)["vocab_size"], samples, length)
    mesh = Mesh(np.asarray(jax.devices()), ("d",)) if jax.device_count() > 1 else None
    with processes.team() as all_of_them:
        pool = pool_of(mesh, all_of_them)
        options = Options(seq_len=length, batch_size=1)
        job = prepare(checkpoint, checkpoint.with_name("nothing"), tokens, options, {}, pool)
        blocks = [b for b in job.session.blocks if b.name == "embed" or b.name.startswith("layers/")]
        (hidden, *_), _ = job.open_hidden(0)
        costs = []
        with BlockReader(job, blocks) as reader:
            for block in blocks:
                leaves = reader(block)
                pool.meet()
                seen, cost = running.measured(job.session.calibrate, block, leaves, hidden)
                costs.append(cost)
        sums = [seen.fitted(group.name) for group, _ in job.session.work(blocks[-1])]
        grams = [np.asarray(s.gram) for s in sums if s]
        timed = costs[2:] or costs[1:]  # not the embedding, and not the first layer
        cpus = [float(t) for t in pool.meet(str(sum(c.cpu for c in timed) / len(timed)))]
    d, nbytes = pool.size, sum(g.nbytes for g in grams)
    return {
        "processes": size,
        "devices": d,
        "kind": jax.devices()[0].device_kind,
        "wall_s_per_layer": sum(c.wall for c in timed) / len(timed),
        "cpu_s_per_layer": sum(cpus),
        "gram_bytes_per_layer": nbytes,
        "bytes_moved_per_layer": -(-samples // d) * (d - 1) * nbytes,
        "bytes_moved_per_device_and_batch": nbytes * (d - 1) // d,
        "tokens": samples * length,
        "grams": hashlib.sha256(b"".join(g.tobytes() for g in grams)).hexdigest()[:16],
    }


def launch(checkpoint: Path, samples: int, length: int, size: int, each: int) -> Measured:
    """What the first of ``size`` processes with so many devices each says."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={each}"
    with (
        mock.patch.dict(os.environ, XLA_FLAGS=flags),
        ProcessPoolExecutor(size, multiprocessing.get_context("spawn")) as pool,
    ):
        ranks = [pool.submit(measure, checkpoint, samples, length, rank, size, port) for rank in range(size)]
        first, *_ = (rank.result() for rank in ranks)
        return first


def devices(
    directory: Path,
    *,
    samples: int = 16,
    seq_len: int = 512,
    teams: tuple[str, ...] = ("1x1", "1x2", "1x4", "1x8", "2x4"),
) -> running.Row:
    """All teams, processes x devices of each, one after another; the first is what the others are compared with."""
    rows = [launch(directory, samples, seq_len, *map(int, team.split("x"))) for team in teams]
    first = float(rows[0]["cpu_s_per_layer"])
    return {
        "command": f"python benchmarks/stream.py devices DIR --samples {samples} --seq-len {seq_len}",
        "checkpoint": json.loads((directory / "config.json").read_text()),
        **running.machine(),
        "same_grams": len({row["grams"] for row in rows}) == 1,
        "rows": [row | {"cpu_over_one_device": float(row["cpu_s_per_layer"]) / first} for row in rows],
    }
