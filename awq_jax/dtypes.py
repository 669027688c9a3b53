"""The floating-point types that weights and activations are stored in, by name."""

import contextlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from awq_jax.errors import ConfigError

FLOATS: Mapping[str, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

_PIECE = 1 << 18  # elements


def name_of(dtype: DTypeLike | None, what: str = "dtype") -> str | None:
    """The name in `FLOATS` of a type given as a name or, like ``jnp.bfloat16``, as a type; None for None.

    Raises:
      ConfigError: it is none of them; ``what``: the argument's name.
    """
    if dtype is None:
        return None
    with contextlib.suppress(TypeError):
        if (name := np.dtype(dtype).name) in FLOATS:
            return name
    raise ConfigError(f"{what} must be one of {', '.join(FLOATS)} or None; got {dtype!r}")


def all_finite(array: np.ndarray) -> bool:
    """Whether no element of an array of one of `FLOATS` is NaN or inf; it is looked at in pieces."""
    flat = array.reshape(-1)
    exponent = 0x7F80 if array.dtype == FLOATS["bfloat16"] else 0
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        if exponent:  # NumPy's own test of this type is slow
            bits = piece.view(np.uint16)
            if ((bits & exponent) == exponent).any():
                return False
        elif not np.isfinite(piece).all():
            return False
    return True
