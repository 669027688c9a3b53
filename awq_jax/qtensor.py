"""`QuantizedTensor`: a packed weight that stands where a float leaf stood in a parameter tree."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from awq_jax import pack
from awq_jax.errors import ShapeError, WeightError
from awq_jax.pack import Array
from awq_jax.placement import Placement

if TYPE_CHECKING:
    from typing_extensions import TypeIs

ARRAYS = ("qweight", "scales", "zeros", "inv_scale", "offsets", "perm")
_A = TypeVar("_A", jax.Array, np.ndarray)
STATIC = ("bits", "group_size", "axes", "k_dims", "n_dims", "dtype", "layout")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A groupwise quantized weight, ``w = (q - zero) * scale`` or ``q * scale + offset`` (a pytree node).

    The leaf it replaces is seen as ``[*B, K, N]``: batch axes (scanned layers, experts), the
    contracted axes flattened, the output axes flattened. ``Kp`` is K rounded up to a multiple of
    the group; the extra rows are zero.

    Attributes:
      qweight: uint32 ``[*B, ceil(Kp*bits/32), N]``, LSB-first along K (see `awq_jax.pack`).
      scales: float ``[*B, Kp/g, N]``.
      zeros: uint8 ``[*B, Kp/g, N]``, or None if symmetric (zero point ``2**(bits-1)``) or if there
        are ``offsets``.
      inv_scale: float ``[*B, K]`` or None: the activation is multiplied by it before the matmul.
      bits: bits per code.
      group_size: rows per scale, already resolved (never -1).
      axes: the role of each axis of the float leaf, ``b``, ``k`` or ``n``, e.g. ``"kn"`` for a
        Flax Dense kernel, ``"nk"`` for a PyTorch Linear weight, ``"bkn"`` for stacked experts.
      k_dims: sizes of the ``k`` axes, in order.
      n_dims: sizes of the ``n`` axes, in order.
      dtype: name of the dtype the weight dequantizes to.
      offsets: float ``[*B, Kp/g, N]`` or None: ``w = q * scale + offset``, the form of MLX, GGUF's Q4_1
        and AutoAWQ's gemv_fast, where the zero point need not be a whole number.
      perm: int32 ``[*B, K]`` or None: packed row ``r`` belongs to input channel ``perm[r]`` (GPTQ's
        act-order; groups are contiguous in packed rows).
      layout: how ``qweight`` is stored: ``"canonical"`` (as above, what files hold) or ``"cuda"``
        (uint16 ``[*B, N, W]``, see `awq_jax.pack`).
      placement: how it lies on a mesh, so that each device multiplies by its own part (see
        `awq_jax.kernels.parallel`); None on one device.

    Slicing or stacking every array along leading batch axes (``jax.lax.scan``, ``vmap``,
    ``jax.tree.map(lambda a: a[i], q)``) gives a valid QuantizedTensor of the slice, as long as the
    axes removed are the first ``b`` axes of ``axes``.
    """

    qweight: Array
    scales: Array
    zeros: Array | None
    inv_scale: Array | None
    bits: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    axes: str = dataclasses.field(metadata={"static": True})
    k_dims: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    n_dims: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    offsets: Array | None = None
    perm: Array | None = None
    layout: str = dataclasses.field(default="canonical", metadata={"static": True})
    placement: Placement | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def k(self) -> int:
        """Contracted size K (without padding)."""
        return math.prod(self.k_dims)

    @property
    def n(self) -> int:
        """Output size N."""
        return math.prod(self.n_dims)

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the leading batch axes that are still there."""
        return tuple(self.qweight.shape[:-2])

    @property
    def live_axes(self) -> str:
        """``axes`` without the leading batch axes that were sliced away."""
        gone = self.axes.count("b") - len(self.batch)
        axes = self.axes
        while gone > 0:
            axes = axes.replace("b", "", 1)
            gone -= 1
        return axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the float leaf this replaces."""
        dims = {"b": iter(self.batch), "k": iter(self.k_dims), "n": iter(self.n_dims)}
        return tuple(next(dims[a]) for a in self.live_axes)

    @property
    def ndim(self) -> int:
        return len(self.live_axes)

    @property
    def symmetric(self) -> bool:
        return self.zeros is None and self.offsets is None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays as stored here."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(self))

    def canonical_to_leaf(self, w: jax.Array) -> jax.Array:
        """``[*B, K, N]`` to the float leaf's own shape."""
        return from_canonical(w, self.live_axes, self.k_dims, self.n_dims)

    def codes(self) -> jax.Array:
        """uint8 codes ``[*B, Kp, N]``, from either layout."""
        rows = self.scales.shape[-2] * self.group_size
        if self.layout == "cuda":
            place = self.placement
            parts = place.size if place is not None and place.dim == "k" else 1
            return pack.unpack_cuda(self.qweight, self.bits, rows, parts)
        return pack.unpack(self.qweight, self.bits, rows)

    def dequantize_canonical(self, dtype: DTypeLike | None = None) -> jax.Array:
        """The weight as packed, ``[*B, K, N]``: *without* ``inv_scale``, rows in packed order.

        Args:
          dtype: dtype of the result (default: ``self.dtype``). The arithmetic is done in float32.
        """
        codes = self.codes().astype(jnp.float32)
        *lead, kp, n = codes.shape
        g = self.group_size
        codes = codes.reshape(*lead, kp // g, g, n)
        scales = self.scales.astype(jnp.float32)[..., None, :]
        if self.offsets is not None:
            w = codes * scales + self.offsets.astype(jnp.float32)[..., None, :]
        else:
            zeros = 2.0 ** (self.bits - 1) if self.zeros is None else self.zeros.astype(jnp.float32)[..., None, :]
            w = (codes - zeros) * scales
        return w.reshape(*lead, kp, n)[..., : self.k, :].astype(dtype or self.dtype)

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """The float leaf this stands for: rows in the order of the inputs, ``inv_scale`` applied."""
        w = self.dequantize_canonical(jnp.float32)
        if self.perm is not None:
            w = jnp.take_along_axis(w, jnp.argsort(self.perm, axis=-1)[..., None], axis=-2)
        if self.inv_scale is not None:
            w = w * self.inv_scale.astype(jnp.float32)[..., :, None]
        return self.canonical_to_leaf(w).astype(dtype or self.dtype)


Weight = jax.Array | QuantizedTensor  # a parameter of a model


def is_quantized(x: object) -> TypeIs[QuantizedTensor]:
    """True for a `QuantizedTensor` (use as ``is_leaf=``)."""
    return isinstance(x, QuantizedTensor)


def to_state(q: QuantizedTensor) -> dict[str, Array]:
    """Its arrays by name, and ``static``: the other fields as JSON, uint8 ``[L]``.

    Raises:
      WeightError: it lies on a mesh.
    """
    if q.placement is not None:
        raise WeightError("a weight packed for a mesh cannot be saved as it is: use awq_jax.convert.to_state(params)")
    arrays = {name: getattr(q, name) for name in ARRAYS if getattr(q, name) is not None}
    static = json.dumps({name: getattr(q, name) for name in STATIC})
    return {**arrays, "static": np.frombuffer(static.encode(), np.uint8)}


def from_state(like: object, state: Mapping[str, Array]) -> QuantizedTensor:
    """The inverse of `to_state`; without ``static`` the fields are those of ``like``.

    Raises:
      WeightError: there is neither, or they do not fit the arrays.
    """
    arrays: dict[str, Any] = {name: state.get(name) for name in ARRAYS}
    if "static" not in state:
        if not isinstance(like, QuantizedTensor):
            raise WeightError(
                "these arrays of a packed weight lack bits, group size and axes (Orbax keeps them in the target only): "
                "give a packed tree as target, or save awq_jax.convert.to_state(params)"
            )
        return dataclasses.replace(like, **arrays)
    try:
        static = json.loads(np.asarray(state["static"], np.uint8).tobytes())
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v := static[name], list) else v for name in STATIC}
        q = QuantizedTensor(**arrays, **fields)
        rows = q.scales.shape[-2] * q.group_size
        whole = q.qweight.shape[-2:] == (pack.words(rows, q.bits), q.n) if q.layout == "canonical" else True
        if not whole or not 0 <= rows - q.k < q.group_size:
            raise ValueError(f"{q.qweight.shape} codes and {q.scales.shape} scales")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise WeightError(f"a packed weight is damaged ({type(e).__name__}: {e}); save it again") from e
    return q


# What `flax.serialization.to_bytes` and `from_bytes` do with a packed leaf.
flax.serialization.register_serialization_state(QuantizedTensor, to_state, from_state)


def _static_to_json(static: Any) -> bytes:
    *values, placement = static
    if placement is not None:
        raise WeightError("a function of weights packed for a mesh cannot be serialized: export it before placing them")
    return json.dumps(dict(zip(STATIC, values, strict=True))).encode()


def _static_from_json(data: bytes) -> tuple[object, ...]:
    fields = json.loads(data)
    return (*(tuple(v) if isinstance(v := fields[name], list) else v for name in STATIC), None)


# What `jax.export` writes of the structure of arguments with a packed leaf.
jax.export.register_pytree_node_serialization(
    QuantizedTensor,
    serialized_name="awq_jax.QuantizedTensor",
    serialize_auxdata=_static_to_json,
    deserialize_auxdata=_static_from_json,
)


def split_shape(shape: tuple[int, ...], axes: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(batch, k, n) sizes of a leaf of ``shape`` whose axes play the roles ``axes``.

    Raises:
      ShapeError: if the numbers of axes differ, or a role is unknown or absent.
    """
    if len(shape) != len(axes) or set(axes) - set("bkn") or "k" not in axes or "n" not in axes:
        raise ShapeError(f"axes {axes!r} do not describe a weight of shape {shape}")
    pick = {r: tuple(d for d, a in zip(shape, axes, strict=True) if a == r) for r in "bkn"}
    return pick["b"], pick["k"], pick["n"]


def to_canonical(w: _A, axes: str) -> _A:
    """A float leaf to ``[*B, K, N]``."""
    b, k, n = split_shape(w.shape, axes)
    order = [i for r in "bkn" for i, a in enumerate(axes) if a == r]
    return w.transpose(order).reshape(*b, math.prod(k), math.prod(n))


def from_canonical(w: jax.Array, axes: str, k_dims: tuple[int, ...], n_dims: tuple[int, ...]) -> jax.Array:
    """``[*B, K, N]`` to a leaf whose axes play the roles ``axes``."""
    order = [i for r in "bkn" for i, a in enumerate(axes) if a == r]
    w = w.reshape(*w.shape[:-2], *k_dims, *n_dims)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return jnp.transpose(w, inverse)
