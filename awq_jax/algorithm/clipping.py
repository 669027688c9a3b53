"""Search for clipped ranges of the groups (arXiv 2306.00978)."""

from typing import Any

import jax
import jax.numpy as jnp

from awq_jax.algorithm.grid import Grid, make_grid, nearest_error, range_of


def diagonal_blocks(gram: jax.Array, group: int) -> jax.Array:
    """``[G, g, g]`` blocks of ``gram [K, K]`` on the diagonal."""
    k = gram.shape[0]
    blocks = gram.reshape(k // group, group, k // group, group)
    return jnp.einsum("igih->igh", blocks)


def clip_search(
    w: jax.Array, metric: jax.Array, bits: int, symmetric: bool, dtype: str, step: float = 0.05, floor: float = 0.5
) -> Grid:
    """Shrink each group's range so that its own squared output error is least.

    Paper section 3.2 ("clipping"), with upper and lower bound shrunk independently and the error taken from second
    moments instead of sampled activations. A bound is multiplied by 1 less some steps, and by more than ``floor``:
    every other number of steps is tried for both, then the neighbours of what is best so far: a third of the trials of
    all pairs, for an error within .3 % of theirs (3 and 4 bits, groups of 16 to 128, one energy per row).

    Args:
      w: ``[G, g, N]``.
      metric: what an error costs: the diagonal blocks of the Gram ``[G, g, g]``, or one energy per row
        ``[G, g]`` (see `conditional_energy`).
    """
    low, high = range_of(w)
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    most = round((1 - floor) / step) - 1  # steps that a bound is moved in by

    def grid_of(moved: jax.Array) -> Grid:
        lower, upper = 1 - step * moved
        return make_grid(low * lower, high * upper, bits, symmetric, dtype)

    def trial(best: tuple[jax.Array, jax.Array], to: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        offset, around = to
        moved = jnp.clip(around * best[0] + offset[:, None, None], 0, most)
        delta = nearest_error(w, grid_of(moved), bits)
        if metric.ndim == 2:
            loss = (metric[:, :, None] * (delta * delta)).sum(axis=1)
        else:
            loss = (delta * jnp.einsum("Ghg,Ggn->Ghn", metric, delta)).sum(axis=1)
        better = loss < best[1]
        return (jnp.where(better, moved, best[0]), jnp.where(better, loss, best[1])), None

    coarse, fine = range(0, most + 1, 2), (-1, 1)
    if symmetric:
        tried = [(n, n, 0) for n in coarse] + [(n, n, 1) for n in fine]
    else:
        tried = [(m, n, 0) for m in coarse for n in coarse]
        tried += [(n, 0, 1) for n in fine] + [(0, n, 1) for n in fine] + [(m, n, 1) for m in fine for n in fine]
    steps = jnp.array(tried, jnp.float32)
    start = jnp.zeros((2, *low.shape), jnp.float32), jnp.full(low.shape, jnp.inf)
    (moved, _), _ = jax.lax.scan(trial, start, (steps[:, :2], steps[:, 2]))
    return grid_of(moved)
