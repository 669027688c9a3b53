"""Words that GPTQModel makes for its CPU kernels at the first forward pass, and transformers then saves as they are.

Of 4-bit AWQ and GPTQ linears of K inputs and N outputs. For its AVX-512 kernel: ``qweight`` uint8 ``[N, K/2]``, in C
order ``[N/32, K/2, 16, 2]``, whose byte ``[u, j, i, c]`` holds the codes of input ``2j + c``, of output ``32u + i`` low
and of output ``32u + 16 + i`` high; ``qzeros`` uint8 ``[K/g, N]``, the zero points themselves; scales are float32.
For torch's own int4 kernel ``qweight`` looks the same, but its order is the processor's; ``qzeros`` are not uint8.
"""

from collections.abc import Mapping

import numpy as np

from awq_jax.convert.arrays import codes
from awq_jax.convert.files.safetensors import Entry
from awq_jax.dtypes import FLOATS
from awq_jax.errors import CheckpointError, FormatError

OUTPUTS = 32  # whose codes alternate


def are_in(entries: Mapping[str, Entry]) -> bool:
    """Whether a module's tensors are of that kind."""
    return entries["qweight"].dtype == np.uint8


def sizes(module: str, entries: Mapping[str, Entry]) -> tuple[int, int, int]:
    """``(N, K, groups)``.

    Raises:
      FormatError: the order of the codes is not known.
      CheckpointError: the tensors do not fit each other.
    """
    q, z, s = (entries[part] for part in ("qweight", "qzeros", "scales"))
    if z.dtype != np.uint8:
        raise FormatError(
            f"{module} was saved after a forward pass (qweight is uint8 {q.shape}, qzeros {z.dtype}): GPTQModel had "
            "put its codes into the order of torch's int4 kernel, which is the processor's and not in the file; "
            "take the checkpoint that was loaded there, or save the model before it runs"
        )
    n, k = (q.shape[0], q.shape[1] * 2) if len(q.shape) == 2 else (0, 0)
    if (
        n < 1
        or k < 1
        or n % OUTPUTS
        or len(s.shape) != 2
        or s.shape[1:] != (n,)
        or z.shape != s.shape
        or k % s.shape[0]
    ):
        raise CheckpointError(
            f"{module} has qweight {q.shape}, qzeros {z.shape} and scales {s.shape}, which do not fit each other"
        )
    if s.dtype.name not in FLOATS:
        raise CheckpointError(f"{module}.scales is {s.dtype}, not a floating-point type")
    return n, k, s.shape[0]


def unpack(qweight: np.ndarray) -> np.ndarray:
    """uint8 ``[N, K/2]`` to canonical uint32 ``[ceil(K/8), N]``."""
    n, half = qweight.shape
    words = qweight.reshape(n // OUTPUTS, half, OUTPUTS // 2, 2)
    both = np.stack([words & 15, words >> 4], axis=2)  # of units of outputs: K/2, half of the outputs, output, c
    return codes.pack(both.transpose(1, 4, 0, 2, 3).reshape(2 * half, n), 4)
