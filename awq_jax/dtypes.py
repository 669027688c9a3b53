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
