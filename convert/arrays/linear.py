"""A packed linear between files and memory: building and checking `QuantizedTensor`s of NumPy arrays."""

from __future__ import annotations

import dataclasses

import numpy as np

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


def explicit_zeros(zeros: np.ndarray, bits: int, symmetric: bool) -> np.ndarray | None:
    """The zero points that a file holds, or None if they are those of a weight said to be ``symmetric``."""
    return None if symmetric and bool(np.all(zeros == 2 ** (bits - 1))) else zeros


def is_permutation(perm: np.ndarray) -> bool:
    """Whether the last axis of ``perm`` holds each of ``0 … K-1`` once."""
    return bool((np.sort(perm, axis=-1) == np.arange(perm.shape[-1])).all())


def as_linear(q: QuantizedTensor) -> QuantizedTensor:
    """The same weight in PyTorch's orientation, if it is a single matrix, and in the canonical layout."""
    q = to_canonical(q)
    if q.batch:
        return q
    return dataclasses.replace(q, axes="nk", k_dims=(q.k,), n_dims=(q.n,))
