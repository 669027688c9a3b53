"""Memory that XLA uses where it lies."""

import math

import numpy as np

ALIGNMENT = 64  # bytes; XLA on a CPU copies what begins elsewhere


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array like `numpy.empty`'s that begins at a multiple of `ALIGNMENT`."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
