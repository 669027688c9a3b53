"""Arrays that NumPy can read where they lie, for work that is not worth a compiled program for each shape."""

from typing import Any, cast

import jax
import numpy as np


def view(array: object) -> np.ndarray | None:
    """``array`` as NumPy sees it, not copied; None if it is not whole in the host's memory, or a tracer."""
    if isinstance(array, np.ndarray):
        return array
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        return None
    devices = array.devices()
    if len(devices) > 1 or next(iter(devices)).platform != "cpu" or not array.is_fully_addressable:
        return None
    if array.dtype in (np.float32, np.float16):
        return np.from_dlpack(
            cast(Any, array)
        )  # `np.asarray` would stay with the array, which could not be donated any more
    return np.asarray(array)
