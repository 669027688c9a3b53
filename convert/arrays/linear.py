"""A packed linear between files and memory: building and checking `QuantizedTensor`s of NumPy arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from awq_jax.kernels.layout import to_canonical
from awq_jax.qtensor import QuantizedTensor


def build(
    qweight: Any,
    scales: Any,
    zeros: Any,
    bits: int,
    group_size: int,
    k: int,
    n: int,
    dtype: str,
    inv_scale: Any = None,
    offsets: Any = None,
    perm: Any = None,
) -> QuantizedTensor:
    """A linear in PyTorch's orientation (``axes="nk"``); arrays as `QuantizedTensor` describes them."""
    return QuantizedTensor(
        qweight=qweight,
        scales=scales,
        zeros=zeros,
        inv_scale=inv_scale,
        bits=bits,
        group_size=group_size,
        axes="nk",
        k_dims=(k,),
        n_dims=(n,),
        dtype=dtype,
        offsets=offsets,
        perm=perm,
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
