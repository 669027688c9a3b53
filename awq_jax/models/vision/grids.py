"""Where the patches of images of different sizes stand: index arithmetic that `jax.jit` can trace.

The number of patches is a shape, their arrangement (``grids [I, 3]``: frames, rows and columns of
patches of each image) is data, so that images of other proportions need no new program.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Places:
    """Where each patch stands; all int32 ``[P]``.

    Attributes:
      frame: number of its picture, counted through all images.
      row, column: in the picture, in patches.
      height, width: of the picture, in patches.
    """

    frame: jax.Array
    row: jax.Array
    column: jax.Array
    height: jax.Array
    width: jax.Array


def _of_sequence(ends: jax.Array, count: int) -> jax.Array:
    """The number of the image that each of ``count`` items belongs to, given where images end ``[I]``."""
    xp = _numpy_of(ends)
    number: jax.Array = xp.searchsorted(ends, xp.arange(count), side="right")
    return xp.minimum(number, ends.shape[0] - 1)


def _numpy_of(a: jax.Array | np.ndarray) -> Any:
    """NumPy for what is on the host."""
    return np if isinstance(a, np.ndarray) else jnp


def places(grids: jax.Array, merge: int, count: int) -> Places:
    """Of ``count`` patches in the order of the processors: squares of ``merge x merge``, row by row."""
    frames, heights, widths = grids.T
    ends = jnp.cumsum(frames * heights * widths)
    image = _of_sequence(ends, count)
    height, width = heights[image], widths[image]
    inside = jnp.arange(count) - (ends - frames * heights * widths)[image]
    frame, inside = inside // (height * width), inside % (height * width)
    square, within = inside // merge**2, inside % merge**2
    row = square // (width // merge) * merge + within // merge
    column = square % (width // merge) * merge + within % merge
    return Places((jnp.cumsum(frames) - frames)[image] + frame, row, column, height, width)


def same_picture(p: Places) -> jax.Array:
    """Which patches see each other: bool ``[P, P]``."""
    return p.frame[:, None] == p.frame


def same_window(p: Places, side: int) -> jax.Array:
    """Which patches lie in the same square of ``side x side`` patches of a picture: bool ``[P, P]``."""
    row, column = p.row // side, p.column // side
    return same_picture(p) & (row[:, None] == row) & (column[:, None] == column)


def angles(p: Places, head_dim: int, theta: float = 10000.0) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of a rotation by row (first half of the pairs) and column: float32 ``[P, 1, head_dim / 2]``."""
    half = head_dim // 2
    inv_freq = jnp.float32(theta) ** -(jnp.arange(0, half, 2, dtype=jnp.float32) / half)
    turn = jnp.concatenate([n[:, None].astype(jnp.float32) * inv_freq for n in (p.row, p.column)], axis=-1)
    return jnp.cos(turn)[:, None], jnp.sin(turn)[:, None]


def stretched(table: jax.Array, side: int, p: Places) -> jax.Array:
    """A square of vectors ``table [side * side, size]`` drawn over each picture, bilinear: ``[P, size]``.

    The corners of the square lie on the corner patches.
    """

    def along(index: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        at = index.astype(jnp.float32) * (side - 1) / jnp.maximum(length - 1, 1)
        low = jnp.floor(at).astype(jnp.int32)
        return low, jnp.minimum(low + 1, side - 1), (at - low)[:, None]

    top, bottom, down = along(p.row, p.height)
    left, right, across = along(p.column, p.width)
    upper = table[top * side + left] * (1 - across) + table[top * side + right] * across
    lower = table[bottom * side + left] * (1 - across) + table[bottom * side + right] * across
    return upper * (1 - down) + lower * down


def rope_positions(seen: jax.Array, grids: jax.Array, merge: int) -> tuple[jax.Array, jax.Array]:
    """Frame, row and column by which a decoder rotates each token (arXiv 2409.12191, section 2.1).

    Text goes on by one in all three. The tokens of an image share the place where it begins, and differ
    by frame, row and column; the text after it goes on after the longer edge.

    Args:
      seen: bool ``[B, T]``: tokens that stand for a feature of an image.
      grids: int32 ``[I, 3]`` of the images, in the order of their tokens.
      merge: patches along the edge of a feature.

    Returns:
      int32 ``[3, B, T]``, and int32 ``[B]``: what later tokens' positions differ by from their number. Of NumPy's
      arrays such (of 64 bits), of others JAX's.
    """
    xp = _numpy_of(seen)
    frames, heights, widths = grids[:, 0], grids[:, 1] // merge, grids[:, 2] // merge
    counts = frames * heights * widths
    ends = xp.cumsum(counts)
    rank = (xp.cumsum(seen.reshape(-1)) - 1).reshape(seen.shape)
    image = _of_sequence(ends, seen.size)[xp.maximum(rank, 0)]
    inside = rank - (ends - counts)[image]
    height, width = heights[image], widths[image]
    offsets = xp.stack([inside // (height * width), inside // width % height, inside % width])
    last = inside == counts[image] - 1
    advance = xp.where(seen, xp.where(last, xp.maximum(height, width), 0), 1)
    start = xp.cumsum(advance, axis=1) - advance
    return start + xp.where(seen, offsets, 0), advance.sum(axis=1) - seen.shape[1]
