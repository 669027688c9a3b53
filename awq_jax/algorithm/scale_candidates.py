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
import numpy as np

from awq_jax.algorithm.grid import column_loss, make_grid, nearest_error, range_of
from awq_jax.config import LeafConfig

LIMIT = 1e4  # largest ratio between a scale and the group's geometric centre


def shared_mean(log_scale: np.ndarray, shared: np.ndarray | None) -> np.ndarray:
    """Average ``log_scale [E, K]`` over channels with equal numbers in ``shared [E*K]``: their geometric mean."""
    if shared is None:
        return log_scale
    flat = log_scale.reshape(-1)
    total = np.bincount(shared, flat, len(flat))
    count = np.bincount(shared, minlength=len(flat))
    return (total / np.maximum(count, 1))[shared].reshape(log_scale.shape)


def weight_share(w: jax.Array, group_size: int) -> jax.Array:
    """Sum over columns of ``|w| / (largest |w| of its group)``, ``[K]``, of ``w [K, N]``."""
    k, n = w.shape
    magnitude = jnp.abs(w).reshape(k // group_size, group_size, n)
    share = magnitude / jnp.maximum(magnitude.max(axis=1, keepdims=True), 1e-30)
    return share.reshape(k, n).sum(axis=-1)


def candidate(
    magnitude: np.ndarray, share: np.ndarray, ratio: float, with_weights: bool, shared: np.ndarray | None
) -> np.ndarray:
    """One candidate scale, float32 ``[E, K]``: ``a^r / p^(1-r)``, or ``a^r`` without the weights.

    Normalised to ``sqrt(max * min) = 1``; channels that were never active get 1. By NumPy in float64: a few numbers,
    for which XLA would compile a program for each size.
    """
    live = magnitude > 0
    log_s = ratio * np.log(np.where(live, magnitude, 1.0), dtype=np.float64)
    if with_weights:
        log_s = log_s - (1.0 - ratio) * np.log(share + 1e-4, dtype=np.float64)
    log_s = shared_mean(np.where(live, log_s, 0.0), shared)
    some = live.any(axis=-1, keepdims=True)
    high = np.where(some, np.where(live, log_s, -np.inf).max(axis=-1, keepdims=True), 0.0)
    low = np.where(some, np.where(live, log_s, np.inf).min(axis=-1, keepdims=True), 0.0)
    centre = (high + low) / 2
    log_s = shared_mean(np.where(live, log_s - centre, 0.0), shared)
    bound = np.log(LIMIT)
    return np.exp(np.clip(log_s, -bound, bound)).astype(np.float32)


def candidates(magnitude: np.ndarray, share: np.ndarray, shared: np.ndarray | None, n_grid: int) -> np.ndarray:
    """Scale 1, then those to be tried, ratios rising, with the weights and without: ``[1 + 2 * n_grid, E, K]``."""
    tried = [(n / n_grid, with_weights) for with_weights in (True, False) for n in range(n_grid)]
    return np.stack([np.ones_like(magnitude), *(candidate(magnitude, share, *one, shared) for one in tried)])


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
