"""What more rows cost on a CPU: the compiled product, and a step of an engine, in processor time.

    python benchmarks/cpu_rows.py products
    python benchmarks/cpu_rows.py steps MODEL --rounds 25

Times are the least of many, of the whole process, so that other work on the machine counts little.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from shared import checkpoints, running

import awq_jax
from awq_jax.bench import products as made
from awq_jax.kernels import native
from awq_jax.serve.engine.programs import Programs
from awq_jax.serve.engine.sizes import Sizes

SHAPES = ((576, 3072), (1536, 576), (4096, 14336))


def least(run: Callable[[], object], rounds: int) -> float:
    """Milliseconds of processor time."""
    jax.block_until_ready(run())
    found = []
    for _ in range(rounds):
        start = time.process_time()
        jax.block_until_ready(run())
        found.append(time.process_time() - start)
    return min(found) * 1e3


def products(*, group: int = 64, rounds: int = 60, small: bool = False) -> dict[str, object]:
    """Float32 activations times packed weights of each width.

    Args:
      group: rows of a group.
      rounds: products of each kind.
      small: one small weight.
    """
    rows = []
    for k, n in SHAPES[1:2] if small else SHAPES:
        for bits in (2, 3, 4, 8):
            q = made.weight(0, k, n, group, bits)
            run = jax.jit(lambda x, q: native.matmul(x, q, jnp.float32, most=64))
            for m in (1, 2, 4, 8, 16):
                x = jnp.asarray(np.random.default_rng(0).normal(size=(m, k)), jnp.float32)
                took = least(functools.partial(run, x, q), rounds)
                per_second = m * k * n / took / 1e6
                rows.append({"k": k, "n": n, "bits": bits, "rows": m, "ms": took, "billions_per_second": per_second})
    return {"level": native.target(), "cpus": os.cpu_count(), "rows": rows}


def steps(model: str, *, slots: int = 16, tokens: int = 150, rounds: int = 25) -> dict[str, object]:
    """One step of an engine: the next token of 1, 2, ... slots.

    Args:
      slots: the most.
      tokens: that each slot has.
      rounds: steps of each size.
    """
    loaded = awq_jax.load(model)
    generator, params, _ = loaded.serving()
    programs = Programs(generator, params, Sizes.of(slots, min(tokens + 42, loaded.config.max_length), 16), None)
    caches, took = [programs("cache")], {}
    for rows in programs.sizes.rows:
        at = np.full(rows, tokens, np.int32)

        def step(at: np.ndarray = at, rows: int = rows) -> jax.Array:
            given = np.int32(0), at * 0 + 1, at
            logits: jax.Array
            logits, new = programs("step", params, caches.pop(), *given, None, rows=rows, read=programs.sizes.reads[-1])
            caches.append(new)
            return logits

        took[f"{rows}"] = least(step, rounds)
    most = took[f"{slots}"]
    return {"cpus": os.cpu_count(), "ms": took, "tokens_by_one_slots": slots * took["1"] / most}


def smoke(directory: Path) -> Iterator[list[str]]:
    model, _ = checkpoints.tiny(directory)
    yield ["products", "--small", "--rounds", "1"]
    yield ["steps", model, "--slots", "2", "--tokens", "9", "--rounds", "1"]


main = functools.partial(running.run, (products, steps), smoke)

if __name__ == "__main__":
    main()
