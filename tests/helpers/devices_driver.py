"""What `test_devices` runs in processes of their own: the number of devices is fixed when JAX starts.

python devices_driver.py CHECKPOINT TOKENS OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

import awq_jax
from awq_jax.calibration.accumulate import Accumulator
from awq_jax.calibration.calibration import Stats, Wanted
from awq_jax.devices.pool import Pool
from awq_jax.plan.plan import ScaleGroup, Site

FAST = {"group_size": 16, "method": "awq", "clip": False, "progress": False, "batch_size": 1}


def eight(checkpoint: str, tokens: str, out: str) -> dict[str, object]:
    """A checkpoint by one device and by eight, and the sums by themselves; all in a process that starts once."""
    calib = np.load(tokens)
    devices = np.asarray(jax.devices())
    meshes = {"one": None, "eight": Mesh(devices.reshape(2, 4), ("a", "b"))}
    for name, mesh in meshes.items():
        awq_jax.quantize_checkpoint(checkpoint, Path(out) / name, calib, mesh=mesh, **FAST)
    model = awq_jax.load(checkpoint)
    model.quantize(calib, mesh=meshes["eight"], **FAST)
    model.save(Path(out) / "whole")
    return {"devices": len(devices), "sums": sums_are_ordered(Pool(tuple(devices)))}


def sums_are_ordered(pool: Pool) -> bool:
    """Sums over 11 batches, of Grams whose rows the devices do not divide, are those of a loop, to the bit."""
    rng = np.random.default_rng(0)
    site = Site("w", "kn", (13, 4))
    groups = [ScaleGroup("w", (site,), 13), ScaleGroup("e", (site,), 13, batch=(3,))]
    sums, want = Accumulator(pool, [Wanted(g) for g in groups], "at/"), {}
    for first in range(0, 11, pool.size):
        count = min(pool.size, 11 - first)
        made = {}
        for i in range(first, first + count):
            new = {g.name: _random(rng, g) for g in groups}
            want = jax.tree.map(np.add, want, new) if want else new
            made[i] = pool.place(i, jax.tree.map(lambda a: a[None], new))
        sums.add(made, first, count)
    same = jax.tree.map(
        lambda a, b: bool(np.array_equal(a, b)), {n.removeprefix("at/"): sums.fetch(n) for n in sums.names}, want
    )
    return len(sums.names) == 2 and all(jax.tree.leaves(same))


def _random(rng: np.random.Generator, g: ScaleGroup) -> Stats:
    shapes = ((*g.batch, 13, 13), (*g.batch, 13), g.batch, g.batch)
    return Stats(*(rng.standard_normal(s).astype(np.float32) * 10 ** rng.uniform(-3, 3) for s in shapes))


if __name__ == "__main__":
    print(json.dumps(eight(*sys.argv[1:])))
