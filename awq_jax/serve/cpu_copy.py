"""What a CPU without a kernel for its packed weights is served instead: a dequantized copy; and no 16-bit floats.

XLA on CPU writes a packed weight out as floats, tile by tile, every time it is multiplied by. Where
`awq_jax.kernels.native` cannot be compiled, or does not read the weights, and there is room, that is done once: 8 times
the bytes of 4-bit codes, and decoding as fast as with a float model. A 16-bit float weight XLA writes out whole every
time.
"""

import dataclasses
import math
import os
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from awq_jax import kernels
from awq_jax.kernels import Request, native
from awq_jax.qtensor import QuantizedTensor, Weight, is_quantized

T = TypeVar("T")  # any pytree of leaves, or one leaf

DTYPE = jnp.dtype(jnp.float32)  # CPUs have no fast product of 16-bit floats in XLA
SHARE = 0.5  # of the free memory that a copy may take unasked


def resident(tree: T) -> T:
    """``tree`` with every packed leaf dequantized, and every floating-point one as float32.

    Leaves that are float32 already are the same arrays. The copy of a leaf is as large as its float32
    form; see `nbytes`.
    """

    def copy(leaf: Weight) -> jax.Array:
        if is_quantized(leaf):
            return _dequantize(leaf)
        return leaf.astype(DTYPE) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(copy, tree, is_leaf=is_quantized)


def widened(tree: T) -> T:
    """``tree`` with 16-bit floats as float32; packed leaves stay, and multiply activations of that dtype."""

    def wide(leaf: Weight) -> Weight:
        return narrowed(leaf, DTYPE) if _narrow(leaf.dtype) else leaf

    return jax.tree.map(wide, tree, is_leaf=is_quantized)


def widening(tree: object) -> int:
    """Bytes that `widened` adds."""
    floats = [a for a in jax.tree.leaves(tree, is_leaf=is_quantized) if not is_quantized(a) and _narrow(a.dtype)]
    return sum(math.prod(a.shape) * (DTYPE.itemsize - a.dtype.itemsize) for a in floats)


def _narrow(dtype: DTypeLike) -> bool:
    kind = jnp.dtype(dtype)
    return jnp.issubdtype(kind, jnp.floating) and kind.itemsize < DTYPE.itemsize


def narrowed(leaf: Weight, dtype: DTypeLike) -> Weight:
    """A leaf of `widened` as it was, with its former ``dtype``: exact."""
    if is_quantized(leaf):
        return dataclasses.replace(leaf, dtype=jnp.dtype(dtype).name)
    return leaf.astype(dtype)


def reason(tree: object) -> str | None:
    """Why the compiled kernel does not multiply by every packed weight, or None if it does."""
    packed = [q for q in jax.tree.leaves(tree, is_leaf=is_quantized) if is_quantized(q)]
    found = (native.obstacle(Request(1, kernels.canonical(q), DTYPE, "cpu")) for q in packed)
    return next((f for f in found if f is not None), None)


def nbytes(tree: object) -> int:
    """Bytes that `resident` would add."""

    def added(leaf: Weight) -> int:
        new = is_quantized(leaf) or (jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != DTYPE)
        return math.prod(leaf.shape) * DTYPE.itemsize if new else 0

    return sum(added(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_quantized))


def room() -> int | None:
    """Bytes of memory that other programs leave free, or None if the system does not say."""
    try:
        with open("/proc/meminfo") as f:
            lines = dict(line.split(":", 1) for line in f)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return None


@jax.jit
def _dequantize(q: QuantizedTensor) -> jax.Array:
    # As the packed matmul would use it: codes times scales are rounded to float32, nowhere else.
    return q.dequantize(DTYPE)
