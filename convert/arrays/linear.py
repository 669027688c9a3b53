"""A packed linear between files and memory: building and checking `QuantizedTensor`s of NumPy arrays."""

import dataclasses

import numpy as np

from awq_jax.errors import FormatError
from awq_jax.kernels.layout import to_canonical
from awq_jax.qtensor import QuantizedTensor


def build(
    qweight: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    bits: int,
    group_size: int,
    k: int,
    n: int,
    dtype: str,
    inv_scale: np.ndarray | None = None,
    offsets: np.ndarray | None = None,
    perm: np.ndarray | None = None,
) -> QuantizedTensor:
    """A linear in PyTorch's orientation (``axes="nk"``); arrays as `QuantizedTensor` describes them."""
    return QuantizedTensor(
        qweight, scales, zeros, inv_scale, bits, group_size, "nk", (k,), (n,), dtype, offsets=offsets, perm=perm
    )


def check_symmetric(zeros: np.ndarray, bits: int, part: str, said: str) -> None:
    """Refuse zero points other than ``2**(bits-1)`` of a weight that is said to be symmetric.

    Args:
      zeros: all of the tensor's, uint8.
      bits: of the codes.
      part: name of the tensor.
      said: what ``config.json`` says of it, for the message.

    Raises:
      FormatError: naming the tensor.
    """
    middle = 2 ** (bits - 1)
    odd = zeros[zeros != middle]
    if odd.size:
        raise FormatError(
            f"{part} holds the zero point {odd[0]:.3g} ({odd.size} of {zeros.size} are not {middle}), but {said} in "
            f"config.json means {middle}: every weight would be off; fetch the checkpoint again, or have config.json "
            "say that it is not symmetric if these zero points are meant"
        )


def is_permutation(perm: np.ndarray) -> bool:
    """Whether the last axis of ``perm`` holds each of ``0 … K-1`` once."""
    return bool((np.sort(perm, axis=-1) == np.arange(perm.shape[-1])).all())


def as_linear(q: QuantizedTensor) -> QuantizedTensor:
    """The same weight in PyTorch's orientation, if it is a single matrix, and in the canonical layout."""
    q = to_canonical(q)
    if q.batch:
        return q
    return dataclasses.replace(q, axes="nk", k_dims=(q.k,), n_dims=(q.n,))
