"""Search for clipped ranges of the groups (arXiv 2306.00978)."""

import jax
import jax.numpy as jnp

from awq_jax.algorithm.grid import Grid, make_grid, nearest_error, range_of


def diagonal_blocks(gram: jax.Array, group: int) -> jax.Array:
    """``[G, g, g]`` blocks of ``gram [K, K]`` on the diagonal."""
    k = gram.shape[0]
    blocks = gram.reshape(k // group, group, k // group, group)
    return jnp.einsum("igih->igh", blocks)


def clip_search(
    w: jax.Array, metric: jax.Array, bits: int, symmetric: bool, dtype: str, steps: int = 10, floor: float = 0.5
) -> Grid:
    """Shrink each group's range so that its own squared output error is least.

    Paper section 3.2 ("clipping"), with upper and lower bound shrunk independently and the error
    taken from second moments instead of sampled activations.

    Args:
      w: ``[G, g, N]``.
      metric: what an error costs: the diagonal blocks of the Gram ``[G, g, g]``, or one energy per row
        ``[G, g]`` (see `conditional_energy`).
      steps: factors tried per bound, evenly from 1 down to ``floor`` (exclusive).
    """
    low, high = range_of(w)
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    factors = 1.0 - (1.0 - floor) / steps * jnp.arange(steps, dtype=jnp.float32)
    if symmetric:
        pairs = jnp.stack([factors, factors], axis=1)
    else:
        pairs = jnp.stack(jnp.meshgrid(factors, factors, indexing="ij"), axis=-1).reshape(-1, 2)

    def loss_of(pair: jax.Array) -> tuple[Grid, jax.Array]:
        grid = make_grid(low * pair[0], high * pair[1], bits, symmetric, dtype)
        delta = nearest_error(w, grid, bits)
        if metric.ndim == 2:
            return grid, (metric[:, :, None] * (delta * delta)).sum(axis=1)
        return grid, (delta * jnp.einsum("Ghg,Ggn->Ghn", metric, delta)).sum(axis=1)

    def step(best: tuple[Grid, jax.Array], pair: jax.Array) -> tuple[tuple[Grid, jax.Array], None]:
        grid, loss = loss_of(pair)
        better = loss < best[1]
        kept = Grid(*(jnp.where(better, new, old) for new, old in zip(grid, best[0], strict=True)))
        return (kept, jnp.where(better, loss, best[1])), None

    (grid, _), _ = jax.lax.scan(step, loss_of(pairs[0]), pairs[1:])
    return grid
