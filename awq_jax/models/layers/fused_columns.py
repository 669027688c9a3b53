"""Several linears as one: how their columns stand side by side."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def split(y: jax.Array, sizes: Sequence[int], ways: int = 1) -> list[jax.Array]:
    """The parts of ``y [..., sum(sizes)]``, which have ``sizes`` columns.

    Args:
      y: what `join` gives.
      sizes: multiples of ``ways``.
      ways: ``y`` is this many equal runs of columns, each with its share of every part: one for each device
        of a mesh, which so has its heads' queries, keys and values.
    """
    lead, ends = y.shape[:-1], list(itertools.accumulate(n // ways for n in sizes))
    parts = jnp.split(y if ways == 1 else y.reshape(*lead, ways, -1), ends[:-1], axis=-1)
    return parts if ways == 1 else [p.reshape(*lead, -1) for p in parts]


def join(parts: Sequence[jax.Array], ways: int = 1) -> jax.Array:
    """The inverse of `split`."""
    lead = parts[0].shape[:-1]
    if ways > 1:
        parts = [p.reshape(*lead, ways, -1) for p in parts]
    y = jnp.concatenate(parts, axis=-1)
    return y if ways == 1 else y.reshape(*lead, -1)
