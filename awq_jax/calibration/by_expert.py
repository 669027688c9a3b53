"""Statistics of rows that each go to an expert of their own, by expert."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from awq_jax.kernels import grouped
from awq_jax.kernels.parallel import vary_as


class Sums(NamedTuple):
    """As `awq_jax.calibration.calibration.Stats`, with one leading axis of experts."""

    gram: jax.Array
    abs: jax.Array
    tokens: jax.Array
    dropped: jax.Array


def sums(x: jax.Array, expert: jax.Array, experts: int) -> Sums:
    """Sums over the rows of each expert.

    Rows are put into tiles of one expert each, so that the cost does not grow with the number of experts.

    Args:
      x: float ``[T, K]``. A row with a NaN or inf counts as dropped, one of zeros does not count.
      expert: int32 ``[T]``; -1 for rows without any.
      experts: E.
    """
    finite = jnp.isfinite(x).all(axis=-1)
    x = jnp.where(finite[:, None], x, 0)
    to = jnp.where(expert < 0, experts, expert)
    rows = grouped.tile_rows(len(x), experts)
    slots, owner = grouped.tiles(to, experts + 1, rows)
    tiled = jnp.zeros((len(owner) * rows, x.shape[-1]), x.dtype).at[slots].set(x).reshape(-1, rows, x.shape[-1])
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def step(total: jax.Array, tile: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        rows, e = tile
        gram = jnp.einsum("tk,tj->kj", rows, rows, precision=precision, preferred_element_type=jnp.float32)
        return total.at[e].add(gram), None

    # Inside shard_map what a loop carries must differ along the same axes of the mesh as what is added to it.
    start = vary_as(jnp.zeros((experts + 1, x.shape[-1], x.shape[-1]), jnp.float32), tiled, owner)
    # Tiles after the last are empty; -1 would be the last expert all the same.
    gram, _ = jax.lax.scan(step, start, (tiled, jnp.where(owner < 0, experts, owner)))
    live = (x != 0).any(axis=-1)

    def total(values: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values.astype(jnp.float32), to, experts + 1)[:experts]

    return Sums(gram[:experts], total(jnp.abs(x)), total(live), total(~finite))
