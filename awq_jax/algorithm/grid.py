"""Groupwise affine rounding of one weight matrix: the grid of each group, codes on it, and what they cost.

Everything in `awq_jax.algorithm` knows arrays only. ``w`` is float32 ``[K, N]`` with K a multiple of the group
size g and ``G = K // g``; ``gram`` is ``E[x^T x]`` float32 ``[K, K]`` of the activation that meets
``w``. Columns are independent: the expected squared output error is
``sum_n d_n^T gram d_n`` with ``d = dequantized - w``, so every choice below is made per column.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Grid(NamedTuple):
    """Quantization grid of every (group, column).

    Attributes:
      scale: float32 ``[G, N]``, values exactly representable in the stored dtype; 0 means that
        the group is all zero.
      zero: float32 ``[G, N]``, integers ``0 ... 2**bits - 1``.
    """

    scale: jax.Array
    zero: jax.Array


def store(scale: jax.Array, dtype: str) -> jax.Array:
    """Round ``scale`` to what the stored dtype can represent, back in float32."""
    return scale.astype(dtype).astype(jnp.float32)


def make_grid(low: jax.Array, high: jax.Array, bits: int, symmetric: bool, dtype: str) -> Grid:
    """Grid that covers ``[low, high]`` and 0 (``low``, ``high``: ``[G, N]``).

    Including 0 keeps constant groups away from zero representable: a group in [1.0, 1.1] needs
    codes up to 1.1, which a grid fitted to the range alone cannot reach with a clamped zero point.
    """
    top = 2**bits - 1
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    if symmetric:
        # One more code below zero than above: the wider half spans 2**(bits-1) - 0.5 steps.
        half = 2.0 ** (bits - 1)
        scale = store(jnp.maximum(-low, high) / (half - 0.5), dtype)
        return Grid(scale, jnp.full_like(scale, half))
    scale = store((high - low) / top, dtype)
    zero = jnp.clip(jnp.round(-low / _safe(scale)), 0, top)
    return Grid(scale, zero)


def encode(w: jax.Array, grid: Grid, bits: int) -> jax.Array:
    """Nearest codes, float32 ``[G, g, N]``, of ``w [G, g, N]``."""
    return jnp.clip(jnp.round(w / _safe(grid.scale)[:, None]) + grid.zero[:, None], 0, 2**bits - 1)


def decode(codes: jax.Array, grid: Grid) -> jax.Array:
    """Inverse of `encode`: ``[G, g, N]`` float32."""
    return (codes - grid.zero[:, None]) * grid.scale[:, None]


def error_of(codes: jax.Array, grid: Grid, w: jax.Array) -> jax.Array:
    """``decode(codes) - w``, all ``[K, N]``."""
    return decode(codes.reshape(len(grid.scale), -1, w.shape[-1]), grid).reshape(w.shape) - w


def nearest_error(w: jax.Array, grid: Grid, bits: int) -> jax.Array:
    """``decode(encode(w)) - w``, ``[G, g, N]``, by a product with the reciprocal of the scale.

    Faster, and within a unit in the last place of a step the same; where a weight lies halfway between two codes, it
    may be the error of the other one. For searches: what is stored comes from `encode`.
    """
    inverse, zero = (1.0 / _safe(grid.scale))[:, None], grid.zero[:, None]
    return jnp.clip(jnp.round(w * inverse), -zero, (2**bits - 1) - zero) * grid.scale[:, None] - w


def _safe(scale: jax.Array) -> jax.Array:
    return jnp.where(scale > 0, scale, 1.0)


def range_of(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest value of every (group, column) of ``w [G, g, N]``."""
    return w.min(axis=1), w.max(axis=1)


def quantize_dequantize(w: jax.Array, group: int, bits: int, symmetric: bool, dtype: str) -> jax.Array:
    """Round ``w [K, N]`` to nearest on the unclipped grid and return it in float32."""
    wg = w.reshape(-1, group, w.shape[-1])
    grid = make_grid(*range_of(wg), bits, symmetric, dtype)
    return decode(encode(wg, grid, bits), grid).reshape(w.shape)


def column_loss(delta: jax.Array, gram: jax.Array) -> jax.Array:
    """``d_n^T gram d_n`` for every column of ``delta [K, N]``; never negative.

    ``gram`` may be one energy per row, ``[K]``: a diagonal matrix.
    """
    spread = gram[:, None] * delta if gram.ndim == 1 else gram @ delta
    return jnp.maximum((delta * spread).sum(axis=0), 0.0)
