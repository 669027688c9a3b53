"""Rounding of one weight matrix: several candidates, the best one kept for every column."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from awq_jax.algorithm.clipping import clip_search
from awq_jax.algorithm.compensation import GramFactor, refit
from awq_jax.algorithm.grid import Grid, column_loss, decode, encode, error_of, make_grid, range_of
from awq_jax.algorithm.methods import Rounder
from awq_jax.config import LeafConfig

ROUNDS = 2  # of rounding on the current scales and refitting the scales to the codes


class Rounded(NamedTuple):
    """A rounded matrix ``[K, N]``.

    Attributes:
      codes: uint8 ``[K, N]``.
      scale: float32 ``[G, N]``, exactly representable in the stored dtype, never 0.
      zero: uint8 ``[G, N]``.
      loss: float32 ``[N]``: expected squared output error of each column.
      energy: float32 ``[N]``: expected squared output of each column; 0 without a Gram.
      clipped: float32 ``[N]``: share of each column's groups with a range smaller than the weights'.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array
    loss: jax.Array
    energy: jax.Array
    clipped: jax.Array

    def decode(self, group: int) -> jax.Array:
        """What the codes stand for, float32 ``[K, N]``; ``group``: rows that share a scale."""
        codes = self.codes.astype(jnp.float32).reshape(-1, group, self.codes.shape[-1])
        return decode(codes, Grid(self.scale, self.zero.astype(jnp.float32))).reshape(self.codes.shape)


class _Candidate(NamedTuple):
    codes: jax.Array  # [K, N]
    grid: Grid
    loss: jax.Array  # [N]


def round_matrix(
    w: jax.Array,
    gram: jax.Array | None,
    factor: GramFactor | None,
    *,
    rounder: Rounder,
    leaf: LeafConfig,
    clip: bool,
    dtype: str,
) -> Rounded:
    """Round ``w`` to ``leaf``'s grid so that the expected squared output error is small.

    Plain rounding is always among the candidates and columns are chosen one by one under the full
    Gram, so no column ends worse than plain rounding on the calibration data.

    Args:
      w: float32 ``[K, N]``, already scaled; K a multiple of ``leaf.group_size``.
      gram: float32 ``[K, K]`` of the activation that meets ``w``, or None: nearest rounding, no
        clipping, losses of zero.
      factor: what ``rounder`` made of ``gram``.
      rounder: how codes are chosen on each grid that is tried.
      leaf: bits, group size (resolved), symmetric.
      clip: also try clipped ranges.
      dtype: dtype the scales are stored in.
    """
    g, bits = leaf.group_size, leaf.bits
    wg = w.reshape(-1, g, w.shape[-1])
    full = make_grid(*range_of(wg), bits, leaf.symmetric, dtype)
    if gram is None:
        codes = encode(wg, full, bits).reshape(w.shape)
        best = _Candidate(codes, full, jnp.zeros(w.shape[-1], jnp.float32))
        energy = best.loss
    else:
        meets = gram @ w
        energy = jnp.maximum((w * meets).sum(axis=0), 0.0)
        best = _best(w, wg, gram, meets, factor, full, rounder, leaf, clip, dtype)
    used = best.grid
    # A stored scale of 0 would be legal but divides by zero elsewhere; an all-zero group may have any.
    scale = jnp.where(used.scale > 0, used.scale, 1.0)
    codes = jnp.where(jnp.repeat(used.scale > 0, g, axis=0), best.codes, jnp.repeat(used.zero, g, axis=0))
    clipped = (used.scale < 0.98 * full.scale).mean(axis=0)
    return Rounded(codes.astype(jnp.uint8), scale, used.zero.astype(jnp.uint8), best.loss, energy, clipped)


def _best(
    w: jax.Array,
    wg: jax.Array,
    gram: jax.Array,
    meets: jax.Array,
    factor: GramFactor | None,
    full: Grid,
    rounder: Rounder,
    leaf: LeafConfig,
    clip: bool,
    dtype: str,
) -> _Candidate:
    bits = leaf.bits
    nearest = encode(wg, full, bits).reshape(w.shape)
    best = _Candidate(nearest, full, column_loss(error_of(nearest, full, w), gram))
    start = full
    if clip:
        metric = rounder.clip_metric(gram, factor, leaf.group_size)
        start = clip_search(wg, metric, bits, leaf.symmetric, dtype)

    def step(carry: tuple[_Candidate, Grid], _: None) -> tuple[tuple[_Candidate, Grid], None]:
        best, grid = carry
        codes, loss = rounder.codes(w, gram, factor, grid, bits)
        refitted = refit(meets, gram, codes, grid, dtype)
        best = _better(best, _Candidate(codes, grid, loss))
        best = _better(best, _Candidate(codes, refitted.grid, jnp.maximum(loss + refitted.change, 0.0)))
        return (best, refitted.grid), None

    (best, _), _ = jax.lax.scan(step, (best, start), None, length=ROUNDS)
    return best


def _better(a: _Candidate, b: _Candidate) -> _Candidate:
    """Column by column, the candidate with the smaller loss (``a`` if they are equal or one is a NaN)."""
    take = b.loss < a.loss
    return jax.tree.map(lambda x, y: jnp.where(take, y, x), a, b)
