"""The order of codes in memory: canonical for files and TPUs, ``"cuda"`` for the Triton kernels.

Canonical is one bit stream down each column (see `awq_jax.pack`). A CUDA warp wants the opposite:
each output column contiguous, so that a tile of columns is the left operand of a tensor-core
product straight from registers, and codes that one mask separates. So in the ``"cuda"`` layout
``qweight`` is uint16 ``[*B, N, W]``. Each run of 32 words holds 32 rows per bit field: at 4 bits,
bits ``[4i, 4i+4)`` of word ``32u + j`` are row ``128u + 32i + j``; at 8 bits, bits ``[8i, 8i+8)``
are row ``64u + 32i + j``. A field of 32 words is called a plane; every group size that is a
multiple of 32 gives each plane one scale per column. Scales and zero points stay as they are.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from awq_jax import pack
from awq_jax.errors import ShapeError
from awq_jax.kernels import parallel
from awq_jax.qtensor import QuantizedTensor, is_quantized

T = TypeVar("T")

PLANE = 32  # rows that one bit field of 32 consecutive words holds


def planes(bits: int) -> int:
    """Planes in a run of 32 words: codes per uint16."""
    return 16 // bits


def words(rows: int, bits: int) -> int:
    """uint16 words per column for ``rows`` rows, whole runs."""
    return -(-rows // (PLANE * planes(bits))) * PLANE


def obstacle(q: QuantizedTensor) -> str | None:
    """Why ``q`` has no ``"cuda"`` layout, or None if it has one."""
    if q.bits not in (4, 8):
        return f"codes have {q.bits} bits; the CUDA layout holds 4 or 8"
    if q.group_size % PLANE:
        return f"group size {q.group_size} is not a multiple of {PLANE}"
    if q.axes == "nkn":
        return "its experts are the columns of one matrix; make them a batch first (awq_jax.models.moe.by_expert)"
    return None


def to_cuda(q: QuantizedTensor) -> QuantizedTensor:
    """Repack into the ``"cuda"`` layout; codes, scales and zero points are the same.

    Raises:
      ShapeError: if the layout cannot hold it (see `obstacle`).
    """
    if q.layout == "cuda":
        return q
    reason = obstacle(q)
    if reason is not None:
        raise ShapeError(f"a packed weight of shape {q.shape} has no CUDA layout: {reason}")
    if q.placement is not None:
        return parallel.on_each(to_cuda, q)
    return dataclasses.replace(q, qweight=_pack_cuda(q.qweight, q.bits, _rows(q)), layout="cuda")


def to_canonical(q: QuantizedTensor) -> QuantizedTensor:
    """Repack into the canonical layout, which files hold; exact."""
    if q.layout == "canonical":
        return q
    if q.placement is not None:
        return parallel.on_each(to_canonical, q)
    return dataclasses.replace(q, qweight=_pack_canonical(q.qweight, q.bits, _rows(q)), layout="canonical")


def prepare(tree: T, platform: str | None = None) -> T:
    """Put every packed weight of a tree in the layout its platform's kernels read; once, after loading.

    Args:
      tree: any pytree, e.g. a model's parameters, or one `QuantizedTensor`.
      platform: ``"cuda"``, ``"cpu"`` or ``"tpu"``; default: JAX's default backend.

    Returns:
      The same tree; weights that the layout cannot hold stay canonical. Mathematically nothing
      changes: ``dequantize`` gives the same bits.
    """
    platform = platform or jax.default_backend()
    cuda = platform in ("cuda", "gpu")

    def place(q: Any) -> Any:
        if not is_quantized(q):
            return q
        if not cuda:
            return to_canonical(q)
        return q if obstacle(q) is not None else to_cuda(q)

    return jax.tree.map(place, tree, is_leaf=is_quantized)


def canonical(tree: T) -> T:
    """The inverse of `prepare`: every packed weight in the canonical layout, as converters expect it."""
    return jax.tree.map(lambda q: to_canonical(q) if is_quantized(q) else q, tree, is_leaf=is_quantized)


def unpack_cuda(qweight: jax.Array, bits: int, rows: int) -> jax.Array:
    """uint16 ``[*B, N, W]`` to uint8 codes ``[*B, rows, N]``."""
    *lead, n, w = qweight.shape
    shifts = jnp.arange(0, 16, bits, dtype=jnp.uint16)[:, None]
    fields = (qweight.reshape(*lead, n, w // PLANE, 1, PLANE) >> shifts) & jnp.uint16(2**bits - 1)
    codes = fields.astype(jnp.uint8).reshape(*lead, n, w * planes(bits))[..., :rows]
    return jnp.swapaxes(codes, -1, -2)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _pack_canonical(qweight: jax.Array, bits: int, rows: int) -> jax.Array:
    return pack.pack(unpack_cuda(qweight, bits, rows), bits)


def _rows(q: QuantizedTensor) -> int:
    return int(q.scales.shape[-2]) * q.group_size


@functools.partial(jax.jit, static_argnums=(1, 2))  # fused: the codes are never in memory one by one
def _pack_cuda(qweight: jax.Array, bits: int, rows: int) -> jax.Array:
    codes = jnp.swapaxes(pack.unpack(qweight, bits, rows), -1, -2)
    *lead, n, _ = codes.shape
    w, count = words(rows, bits), planes(bits)
    codes = jnp.pad(codes, [(0, 0)] * (len(lead) + 1) + [(0, w * count - rows)]).astype(jnp.uint16)
    shifts = jnp.arange(0, 16, bits, dtype=jnp.uint16)[:, None]
    fields = codes.reshape(*lead, n, w // PLANE, count, PLANE) << shifts
    return fields.sum(-2, dtype=jnp.uint16).reshape(*lead, n, w)
