"""Whole sequences in folds, for cross-validation, and some that are kept from all fitting: which batch is in which."""

import bisect
import itertools
import math
from collections.abc import Sequence

import numpy as np

FOLDS = 4
TRIED = 1  # of the folds: on it is tried what the others gave; each more costs a factorization
KEPT_OUT = -1  # the fold of sequences by which the result is judged
ALIKE = 4  # of the rows that a batch might have, one in so many is enough
SHARE = 8  # one sequence of so many is kept out, one at least


def kept_out(rows: int) -> int:
    """How many of ``rows`` sequences nothing is fitted to; a single one is halved elsewhere."""
    return max(1, rows // SHARE) if rows > 1 else 0


def _starts(rows: int, folds: int) -> list[int]:
    """The first sequence of each fold, then the first of those kept out, of ``rows``."""
    fitted = rows - kept_out(rows)
    return [-(-fold * fitted // folds) for fold in range(folds + 1)]


def apart(batches: Sequence[np.ndarray], folds: int = FOLDS) -> list[np.ndarray]:
    """The same sequences in batches of which each is in one fold; as they are if their lengths differ.

    Args:
      batches: int32 ``[B, T]``.
      folds: how many, besides the sequences kept out.
    """
    if len({b.shape[1] for b in batches}) != 1:
        return list(batches)
    whole, most = np.concatenate(batches), max(map(len, batches))
    starts = [*_starts(len(whole), folds), len(whole)]
    # If that makes them not much smaller, all are alike: a batch of another shape is another set of programs.
    common = math.gcd(*(b - a for a, b in itertools.pairwise(starts)))
    alike = max(n for n in range(1, most + 1) if common % n == 0)
    most = alike if ALIKE * alike >= most else most
    return [
        part
        for fold in np.split(whole, starts[1:-1])
        if len(fold)
        for part in np.array_split(fold, -(-len(fold) // most))
    ]


def of_batches(rows: Sequence[int], folds: int = FOLDS) -> list[int]:
    """The fold of each batch: those that follow one another together; the last are kept out.

    Args:
      rows: sequences of each, as `apart` made them.
      folds: see there.
    """
    starts, before, out = _starts(sum(rows), folds), 0, []
    for size in rows:
        fold = bisect.bisect_right(starts, before) - 1
        out.append(KEPT_OUT if fold == folds else fold)
        before += size
    return out
