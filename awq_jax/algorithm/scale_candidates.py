"""Scales that the search of one scale group tries, and their losses (arXiv 2306.00978, section 3.2).

Rounding ``s_k w_kn`` instead of ``w_kn``, and dividing the input of channel k by ``s_k``, changes the error that the
weight makes in the output from ``step * e * x_k`` to ``step' * e * x_k / s_k``: e, the rounding error in steps, is as
good as random either way, and the step is set by the largest weight of the group of rows. So a scale above 1
protects its channel as long as it does not raise the step, from which the other channels of the group suffer.

Channels with a large input a deserve protection, and those whose weights are small within their group can be scaled
up before the step rises. The candidates weigh both by one exponent, ``s = a^r / p^(1-r)``, p being the typical share
of the largest weight of the group; and, as the paper has it, ``s = a^r``. Which r is best is measured, not derived.
"""

import jax
import jax.numpy as jnp

from awq_jax.algorithm.grid import column_loss, make_grid, nearest_error, range_of
from awq_jax.config import LeafConfig

LIMIT = 1e4  # largest ratio between a scale and the group's geometric centre


def shared_mean(log_scale: jax.Array, shared: jax.Array | None) -> jax.Array:
    """Average ``log_scale [E, K]`` over channels with equal numbers in ``shared [E*K]``: their geometric mean."""
    if shared is None:
        return log_scale
    flat = log_scale.reshape(-1)
    total = jnp.zeros_like(flat).at[shared].add(flat)
    count = jnp.zeros_like(flat).at[shared].add(1.0)
    return (total / jnp.maximum(count, 1.0))[shared].reshape(log_scale.shape)


def weight_share(w: jax.Array, group_size: int) -> jax.Array:
    """Sum over columns of ``|w| / (largest |w| of its group)``, ``[K]``, of ``w [K, N]``."""
    k, n = w.shape
    magnitude = jnp.abs(w).reshape(k // group_size, group_size, n)
    share = magnitude / jnp.maximum(magnitude.max(axis=1, keepdims=True), 1e-30)
    return share.reshape(k, n).sum(axis=-1)


def candidate(
    magnitude: jax.Array, share: jax.Array, ratio: jax.Array, with_weights: jax.Array, shared: jax.Array | None
) -> jax.Array:
    """One candidate scale ``[E, K]``: ``a^r / p^(1-r)`` (``with_weights = 1``) or ``a^r`` (``with_weights = 0``).

    Normalised to ``sqrt(max * min) = 1``; channels that were never active get 1.
    """
    live = magnitude > 0
    log_a = jnp.log(jnp.where(live, magnitude, 1.0))
    log_s = ratio * log_a - with_weights * (1.0 - ratio) * jnp.log(share + 1e-4)
    log_s = shared_mean(jnp.where(live, log_s, 0.0), shared)
    high = jnp.where(live, log_s, -jnp.inf).max(axis=-1, keepdims=True)
    low = jnp.where(live, log_s, jnp.inf).min(axis=-1, keepdims=True)
    centre = jnp.where(jnp.isfinite(high + low), (high + low) / 2, 0.0)
    log_s = shared_mean(jnp.where(live, log_s - centre, 0.0), shared)
    bound = jnp.log(LIMIT)
    return jnp.exp(jnp.clip(log_s, -bound, bound))


def candidates(magnitude: jax.Array, share: jax.Array, shared: jax.Array | None, n_grid: int) -> jax.Array:
    """Scale 1, then those to be tried, ratios rising, with the weights and without: ``[1 + 2 * n_grid, E, K]``."""
    weighted = jnp.repeat(jnp.array([1.0, 0.0], jnp.float32), n_grid)
    trials = jnp.tile(jnp.arange(n_grid, dtype=jnp.float32) / n_grid, 2), weighted
    made = jax.lax.map(lambda t: candidate(magnitude, share, t[0], t[1], shared), trials)
    return jnp.concatenate([jnp.ones_like(magnitude)[None], made])


def scaled_losses(w: jax.Array, metric: jax.Array, scales: jax.Array, leaf: LeafConfig, dtype: str) -> jax.Array:
    """Losses ``[T, N]`` of rounding ``diag(scale) W`` to nearest, by column, for each of ``scales [T, K]``."""

    def one(s: jax.Array) -> jax.Array:
        scaled = (w * s[:, None]).reshape(-1, leaf.group_size, w.shape[1])
        grid = make_grid(*range_of(scaled), leaf.bits, leaf.symmetric, dtype)
        error = nearest_error(scaled, grid, leaf.bits)  # s times that of w
        if metric.ndim == 1:
            return ((metric / (s * s)).reshape(-1, leaf.group_size, 1) * (error * error)).sum(axis=(0, 1))
        return column_loss(error.reshape(w.shape) / s[:, None], metric)

    return jax.lax.map(one, scales)
