"""Nibbles moved within and between words, as block swaps on whole arrays (Hacker's Delight, 7-3).

Everything works in place on uint32 ``[W, M]``: M independent sets of W words, W a power of two. A
nibble has an index: the bits of its word's number, then the three bits of its place in the word. Each
step exchanges two of these bits.
"""

from collections.abc import Iterator

import numpy as np

SETS = 1 << 14  # sets of words worked on at a time: they and a spare stay in the second cache


def between(x: np.ndarray, spare: np.ndarray, block: int) -> None:
    """Exchange the bits ``block`` (1, 2 or 4) of a nibble's word and of its place.

    Args:
      x: changed in place.
      spare: uint32, at least half as many entries.
    """
    shift, mask = np.uint32(4 * block), np.uint32({1: 0x0F0F0F0F, 2: 0x00FF00FF, 4: 0x0000FFFF}[block])
    pairs = x.reshape(-1, 2, block, x.shape[-1])
    a, b = pairs[:, 0], pairs[:, 1]
    t = spare.reshape(-1)[: a.size].reshape(a.shape)
    np.right_shift(a, shift, out=t)
    np.bitwise_xor(t, b, out=t)
    np.bitwise_and(t, mask, out=t)
    np.bitwise_xor(b, t, out=b)
    np.left_shift(t, shift, out=t)
    np.bitwise_xor(a, t, out=a)


def within(x: np.ndarray, spare: np.ndarray, shift: int, mask: int) -> None:
    """Exchange the nibbles under ``mask`` with those ``shift`` bits above, in every word.

    Args:
      x: changed in place.
      spare: uint32, at least as many entries.
    """
    t = spare.reshape(-1)[: x.size].reshape(x.shape)
    np.right_shift(x, np.uint32(shift), out=t)
    np.bitwise_xor(t, x, out=t)
    np.bitwise_and(t, np.uint32(mask), out=t)
    np.bitwise_xor(x, t, out=x)
    np.left_shift(t, np.uint32(shift), out=t)
    np.bitwise_xor(x, t, out=x)


def transpose8(x: np.ndarray, spare: np.ndarray) -> None:
    """``[8, M]`` as 8x8 matrices of nibbles, transposed: nibble j of word i with nibble i of word j."""
    for block in (4, 2, 1):
        between(x, spare, block)


def interleave4(x: np.ndarray, spare: np.ndarray) -> None:
    """``[4, M]``: nibble ``2a + c`` of word b becomes nibble ``4c + b`` of word a (a, b in 0 … 3, c in 0, 1)."""
    within(x, spare, 8, 0x0000FF00)  # place (a1 a0 c) to (a0 a1 c)
    within(x, spare, 12, 0x0000F0F0)  # to (c a1 a0)
    between(x, spare, 2)
    between(x, spare, 1)


def deinterleave4(x: np.ndarray, spare: np.ndarray) -> None:
    """Inverse of `interleave4`."""
    between(x, spare, 1)
    between(x, spare, 2)
    within(x, spare, 12, 0x0000F0F0)
    within(x, spare, 8, 0x0000FF00)


def chunks(words: int, rows: int, columns: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Ranges of rows with room for their words.

    Args:
      words: W.
      rows: in all.
      columns: words of each of the W kinds in a row.

    Yields:
      A range of rows, uint32 ``[words, rows in the range, columns]`` to fill, and a spare of that size.
    """
    step = max(1, min(rows, SETS * 8 // words // max(1, columns)))
    room, spare = np.empty((2, words * step * columns), np.uint32)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        size = words * (stop - start) * columns
        yield slice(start, stop), room[:size].reshape(words, stop - start, columns), spare[:size]
