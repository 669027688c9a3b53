"""Other arrangements of the same weight: transposed arrays, smaller groups."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from awq_jax.qtensor import QuantizedTensor

STRIP = 16  # rows transposed at a time: they fill cache lines of the result


def transposed(x: np.ndarray) -> np.ndarray:
    """A contiguous copy of ``x.T``, several times faster than NumPy's for large matrices."""
    rows, columns = x.shape
    out = np.empty((columns, rows), x.dtype)
    for r in range(0, rows, STRIP):
        out[:, r : r + STRIP] = x[r : r + STRIP].T
    return out


def regroup(q: QuantizedTensor, size: int) -> QuantizedTensor:
    """The same weight with groups of ``size``, which divides its own: scales and zeros repeated; ``q`` if equal."""
    times = q.group_size // size
    if times == 1:
        return q
    parts: dict[str, Any] = {p: getattr(q, p) for p in ("scales", "zeros", "offsets")}
    repeated: dict[str, Any] = {p: np.repeat(np.asarray(a), times, axis=0) for p, a in parts.items() if a is not None}
    return dataclasses.replace(q, group_size=size, **repeated)
