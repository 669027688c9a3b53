"""Whole sequences in folds, for cross-validation: which batch is in which."""

from collections.abc import Sequence

import numpy as np

FOLDS = 4


def apart(batches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``batches`` of sequences, int32 ``[B, T]``, cut so that there are `FOLDS` of them, if there are as many rows."""
    parts = -(-FOLDS // max(len(batches), 1))
    return [part for b in batches for part in np.array_split(b, min(parts, max(len(b), 1)))]


def of_batches(sizes: Sequence[int]) -> list[int]:
    """The fold of each batch: those that follow one another together, as even as they come.

    Args:
      sizes: tokens of each.
    """
    total, before, out = max(sum(sizes), 1), 0, []
    for size in sizes:
        out.append(min(FOLDS - 1, (2 * before + size) * FOLDS // (2 * total)))
        before += size
    return out
