"""The order of codes in memory: canonical for files and TPUs, ``"cuda"`` for the Triton kernels.

Both orders are described in `awq_jax.pack`. Scales and zero points are the same in either.
"""

import dataclasses
import functools
from typing import TypeVar

import jax

from awq_jax import pack
from awq_jax.errors import ShapeError
from awq_jax.kernels import parallel
from awq_jax.qtensor import QuantizedTensor, is_quantized

T = TypeVar("T")
Leaf = TypeVar("Leaf")


def obstacle(q: QuantizedTensor) -> str | None:
    """Why ``q`` has no ``"cuda"`` layout, or None if it has one."""
    if q.bits not in (4, 8):
        return f"codes have {q.bits} bits; the CUDA layout holds 4 or 8"
    if q.group_size % pack.PLANE:
        return f"group size {q.group_size} is not a multiple of {pack.PLANE}"
    if q.axes == "nkn":
        return (
            "its experts are the columns of one matrix; make them a batch first (awq_jax.models.layers.moe.by_expert)"
        )
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

    def place(q: Leaf) -> Leaf | QuantizedTensor:
        if not is_quantized(q):
            return q
        if not cuda:
            return to_canonical(q)
        return q if obstacle(q) is not None else to_cuda(q)

    return jax.tree.map(place, tree, is_leaf=is_quantized)


def canonical(tree: T) -> T:
    """The inverse of `prepare`: every packed weight in the canonical layout, as converters expect it."""
    return jax.tree.map(lambda q: to_canonical(q) if is_quantized(q) else q, tree, is_leaf=is_quantized)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _pack_canonical(qweight: jax.Array, bits: int, rows: int) -> jax.Array:
    return pack.pack(pack.unpack_cuda(qweight, bits, rows), bits)


def _rows(q: QuantizedTensor) -> int:
    return int(q.scales.shape[-2]) * q.group_size


@functools.partial(jax.jit, static_argnums=(1, 2))  # fused: the codes are never in memory one by one
def _pack_cuda(qweight: jax.Array, bits: int, rows: int) -> jax.Array:
    return pack.pack_cuda(pack.unpack(qweight, bits, rows), bits)
