"""The search for the per-channel scale of one scale group (arXiv 2306.00978, section 3.2).

Shapes: ``E`` instances (experts, or 1), ``K`` channels. The loss of a scale ``s`` is
``sum over sites of tr(D^T H D)`` with ``D = diag(1/s) Q(diag(s) W) - W``: the expected squared
output error over all calibration tokens, for a cost that does not depend on their number.

Where errors will be compensated, H is replaced by the diagonal matrix of what compensation leaves of
each channel (`awq_jax.algorithm.compensation.conditional_energy`): a channel that others can make up for needs no
protection. Measured on a 135M model this cuts the loss of perplexity by a third
(`benchmarks/results/`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from awq_jax.algorithm.scale_candidates import candidates, scaled_losses, weight_share
from awq_jax.config import LeafConfig
from awq_jax.devices.pool import HERE, Pool
from awq_jax.pack import Array
from awq_jax.quantizer.column_pieces import Columns, Place, sweep


class BestScale(NamedTuple):
    """Result of `search`.

    Attributes:
      scale: float32 ``[E, K]``.
      ratio: ``[E]``: the exponent chosen; NaN where the scale is 1.
    """

    scale: np.ndarray
    ratio: np.ndarray


STEP = 3  # between the exponents that are tried first
MANY = 9  # with fewer all are tried at once

_share = jax.jit(weight_share, static_argnames=("group_size",))
_losses = jax.jit(scaled_losses, static_argnames=("leaf", "dtype"))


def search(
    weights: Sequence[tuple[LeafConfig, Columns]],
    metric: Callable[[int], Array],
    magnitude: np.ndarray,
    shared: np.ndarray | None,
    *,
    layer: int = 0,
    n_grid: int,
    joint: bool,
    dtype: str,
    pool: Pool = HERE,
) -> BestScale:
    """Best of ``1 + 2*n_grid`` scales for one group, coarse to fine (see `coarse`).

    Where losses are equal scale 1 wins, then the earlier one.

    Args:
      weights: the sites to be quantized, those of the same storage side by side; E instances.
      metric: the Gram of an instance, float32 ``[K, K]``, or ``[K]`` for a diagonal one. Called in order,
        and once more.
      magnitude: float32 ``[E, K]``: typical size of each channel, ``E|x|`` in the paper; 0 if never active.
      shared: int32 ``[E*K]`` or None.
      layer: which of the scanned layers.
      n_grid: ratios ``0, 1/n_grid, ... (n_grid-1)/n_grid``.
      joint: choose one ratio for all instances (needed where channels of several share one scale).
      dtype: dtype the group scales are stored in.
      pool: devices that share the work.
    """
    magnitude = np.asarray(magnitude, np.float32)
    experts = len(magnitude)
    work = [(leaf, columns, i) for leaf, columns in weights for i in range(columns.pieces)]

    def share(place: Place, e: int, piece: int, _: None) -> jax.Array:
        leaf, columns, i = work[piece]
        return _share(place(columns.piece(layer, e, i)), group_size=leaf.group_size)

    shares = sweep(pool, experts, len(work), lambda e: None, lambda x: x, share)
    total = sum(columns.total for _, columns in weights)
    mean = np.stack([sum(parts[1:], start=parts[0]) for parts in shares]) / np.float32(total)
    scales = candidates(magnitude, mean, shared, n_grid)

    def loss(place: Place, e: int, piece: int, given: tuple[Array, Array]) -> jax.Array:
        leaf, columns, i = work[piece]
        return _losses(place(columns.piece(layer, e, i)), *given, leaf=leaf, dtype=dtype)

    every = np.arange(experts)
    losses = np.full((experts, len(scales)), np.inf)

    def lose(tried: np.ndarray) -> None:
        """Find the losses of candidates ``tried [E, T]``."""
        parts = sweep(pool, experts, len(work), lambda e: (metric(e), scales[tried[e], e]), lambda x: x, loss)
        # [E, T]. Here, as XLA adds all numbers of an array in an order that depends on its threads.
        found = np.stack([sum(np.asarray(piece, np.float64).sum(axis=1) for piece in pieces) for pieces in parts])
        losses[every[:, None], tried] = found.sum(axis=0) if joint else found

    first = coarse(n_grid)
    lose(np.tile(first, (experts, 1)))
    if len(first) < len(scales):
        lose(neighbours(1 + _least(losses[:, 1:]), n_grid))
    # A loss that is not a number beats nothing, and nothing beats it.
    best = np.where(np.isnan(losses[:, 0]), 0, _least(losses))
    ratios = np.concatenate([[np.nan], np.tile(np.arange(n_grid) / n_grid, 2)])
    return BestScale(scales[best, every], ratios[best])


def coarse(n_grid: int) -> np.ndarray:
    """The numbers of the candidates that are tried first.

    A loss changes slowly with the exponent: of many, every third one is tried, and then `neighbours` of the best.
    """
    ratios = np.arange(0, n_grid, STEP if n_grid >= MANY else 1)
    return np.concatenate([[0], 1 + ratios, 1 + n_grid + ratios])


def neighbours(best: np.ndarray, n_grid: int) -> np.ndarray:
    """Candidates ``[E, T]`` between ``best [E]`` and the next ones tried before, of the same kind."""
    lowest = np.where(best > n_grid, 1 + n_grid, 1)[:, None]
    steps = np.array([n for n in range(1 - STEP, STEP) if n])
    return np.clip(best[:, None] + steps, lowest, lowest + n_grid - 1)


def _least(losses: np.ndarray) -> np.ndarray:
    """Where the least of each row is; one that is not a number is none."""
    return np.argmin(np.where(np.isnan(losses), np.inf, losses), axis=1)
