"""The floating-point types that weights and activations are stored in, by name."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

FLOATS: Mapping[str, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
