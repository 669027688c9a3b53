"""Calibration of a layer on several devices and processes: what it costs, and what it moves.

On a CPU devices are simulated: they share its cores, so that more of them cannot take less time, and what is
to be seen is how much more processor time the same work takes (the copies, the all-to-all, the waiting). On
GPUs the seconds are those of the devices. The first layer, which compiles, is left out. Each row carries a
digest of the last layer's Grams, which must be the same for all.
"""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Team:
    """So many processes with so many devices each."""

    processes: int
    devices: int


TEAMS = (Team(1, 1), Team(1, 2), Team(1, 4), Team(1, 8), Team(2, 4))


def team(text: str) -> Team:
    """``"2x4"`` as two processes of four devices each."""
    return Team(*map(int, text.split("x")))


def measure(checkpoint: Path, samples: int, length: int, rank: int, size: int, port: int) -> Measured:
    """In a process whose devices are all to be used."""
    if size > 1:
        processes.join(f"127.0.0.1:{port}", size, rank)
    tokens = checkpoints.random_tokens(checkpoints.hf_config(checkpoint)["vocab_size"], samples, length)
    devices = jax.devices()
    mesh = Mesh(np.asarray(devices), ("d",)) if len(devices) > 1 else None
    with processes.team() as all_of_them:
        pool = pool_of(mesh, all_of_them)
        options = Options(seq_len=length, batch_size=1)
        job = prepare(checkpoint, checkpoint.with_name("nothing"), tokens, options, {}, pool)
        blocks = [b for b in job.session.blocks if b.name == "embed" or b.name.startswith("layers/")]
        hidden, _ = job.open_hidden(0)
        costs = []
        with BlockReader(job, blocks) as reader:
            for block in blocks:
                leaves = reader(block)
                pool.meet()
                fetch, cost = running.measured(job.session.calibrate, block, leaves, hidden)
                costs.append(cost)
        sums = [fetch(group.name) for group, _ in job.session.work(blocks[-1])]
        grams = [np.asarray(s.gram) for s in sums if s]
        timed = costs[2:] or costs[1:]  # not the embedding, and not the first layer
        cpus = [float(t) for t in pool.meet(str(sum(c.cpu for c in timed) / len(timed)))]
    d, nbytes = pool.size, sum(g.nbytes for g in grams)
    return {
        "processes": size,
        "devices": d,
        "kind": devices[0].device_kind,
        "wall_s_per_layer": sum(c.wall for c in timed) / len(timed),
        "cpu_s_per_layer": sum(cpus),
        "gram_bytes_per_layer": nbytes,
        "bytes_moved_per_layer": -(-samples // d) * (d - 1) * nbytes,
        "bytes_moved_per_device_and_batch": nbytes * (d - 1) // d if d > 1 else 0,
        "tokens": samples * length,
        "grams": hashlib.sha256(b"".join(g.tobytes() for g in grams)).hexdigest()[:16],
    }


def launch(checkpoint: Path, samples: int, length: int, team: Team) -> Measured:
    """What the first process of a team says."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={team.devices}"
    with (
        mock.patch.dict(os.environ, XLA_FLAGS=flags),
        ProcessPoolExecutor(team.processes, multiprocessing.get_context("spawn")) as pool,
    ):
        size = team.processes
        ranks = [pool.submit(measure, checkpoint, samples, length, rank, size, port) for rank in range(size)]
        first, *_ = (rank.result() for rank in ranks)
        return first


def compare(checkpoint: Path, samples: int, length: int, teams: tuple[Team, ...] = TEAMS) -> running.Row:
    """All teams, one after another."""
    rows = [launch(checkpoint, samples, length, team) for team in teams]
    first = float(rows[0]["cpu_s_per_layer"])
    return {
        "command": f"python benchmarks/stream.py devices DIR --samples {samples} --seq-len {length}",
        "checkpoint": json.loads((checkpoint / "config.json").read_text()),
        **running.machine(),
        "same_grams": len({row["grams"] for row in rows}) == 1,
        "rows": [row | {"cpu_over_one_device": float(row["cpu_s_per_layer"]) / first} for row in rows],
    }
