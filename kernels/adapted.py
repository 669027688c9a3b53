"""`Adapted`: a weight with a low-rank product beside it, ``x W + (x A) B`` (arXiv 2106.09685)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from awq_jax.errors import ShapeError
from awq_jax.pack import Array
from awq_jax.qtensor import QuantizedTensor, Weight, from_canonical, split_shape, to_canonical

T = TypeVar("T")
FLOAT = "float"  # the layout of a weight that is not packed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(QuantizedTensor):
    """A weight and the factors of its adapter, which stand in a parameter tree where the weight stood (a pytree node).

    Wherever a packed weight is multiplied, so is this: the packed kernel runs as ever, and the adapter's product is
    added to its result. A float weight lies in ``qweight``, canonically ``[*B, K, N]``, with the layout ``"float"``.

    Attributes:
      a: float ``[*B, K, R]``, scaled by alpha over rank; with ``row``, of S adapters: ``[S, K, R]``.
      b: float ``[*B, R, N]``, or ``[S, R, N]``.
      row: int32 ``[rows]`` or None: which adapter each row of a batch has, -1 for none.
    """

    a: Array | None = None
    b: Array | None = None
    row: Array | None = None

    @classmethod
    def of(cls, weight: Weight, a: Array, b: Array, axes: str = "", row: Array | None = None) -> Adapted:
        """``weight`` with an adapter; ``axes``: the roles of a float leaf's axes, as in `QuantizedTensor`.

        Raises:
          ShapeError: if the factors do not fit the weight.
        """
        if isinstance(weight, Adapted):
            raise ShapeError("this weight has an adapter already; take its base")
        if isinstance(weight, QuantizedTensor):
            fields: dict[str, Any] = {f.name: getattr(weight, f.name) for f in dataclasses.fields(QuantizedTensor)}
        else:
            _, k_dims, n_dims = split_shape(tuple(weight.shape), axes)
            fields = {
                "qweight": to_canonical(weight, axes),
                "scales": None,
                "zeros": None,
                "inv_scale": None,
                "bits": 8 * weight.dtype.itemsize,
                "group_size": 1,
                "axes": axes,
                "k_dims": k_dims,
                "n_dims": n_dims,
                "dtype": jnp.dtype(weight.dtype).name,
                "layout": FLOAT,
            }
        out = cls(**fields, a=a, b=b, row=row)
        lead = out.batch if row is None else a.shape[:1]
        rank = a.shape[-1]
        if a.shape != (*lead, out.k, rank) or b.shape != (*lead, rank, out.n):
            raise ShapeError(
                f"factors of shapes {a.shape} and {b.shape} for a weight of {out.k} inputs and {out.n} outputs"
                + (f" and batch axes {out.batch}" if out.batch else "")
            )
        return out

    def base(self) -> Weight:
        """The weight without the adapter; a float one canonically ``[*B, K, N]``."""
        if self.layout == FLOAT:
            return jnp.asarray(self.qweight)
        return QuantizedTensor(**{f.name: getattr(self, f.name) for f in dataclasses.fields(QuantizedTensor)})

    def dequantize_canonical(self, dtype: DTypeLike | None = None) -> jax.Array:
        """The weight with the adapter's product added, ``[*B, K, N]``, rows in packed order."""
        if self.layout == FLOAT and self.row is None:
            return (jnp.asarray(self.qweight) + self._product()).astype(dtype or self.dtype)
        raise ShapeError("the rows of a packed weight with an adapter have no common order; use dequantize")

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """The float leaf this stands for, with the adapter's product added.

        Raises:
          ShapeError: each row has an adapter of its own.
        """
        if self.row is not None:
            raise ShapeError("rows with adapters of their own have no weight in common")
        base = self.base()
        if isinstance(base, QuantizedTensor):
            return (base.dequantize(jnp.float32) + self.canonical_to_leaf(self._product())).astype(dtype or self.dtype)
        return from_canonical(self.dequantize_canonical(dtype), self.live_axes, self.k_dims, self.n_dims)

    def _product(self) -> jax.Array:
        return jnp.matmul(jnp.asarray(self.a), jnp.asarray(self.b), preferred_element_type=jnp.float32)


def of_rows(params: T, row: jax.Array | None) -> T:
    """A tree whose weights have several adapters beside them, for other rows (see `Adapted`); None: as it is."""
    if row is None:
        return params

    def one(leaf: Any) -> Any:
        return dataclasses.replace(leaf, row=row) if isinstance(leaf, Adapted) and leaf.row is not None else leaf

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, Adapted))


def matmul(
    x: jax.Array, q: Adapted, product: Callable[..., jax.Array], out_dtype: DTypeLike, bias: jax.Array | None
) -> jax.Array:
    """``x [*B, ..., K]`` times the weight, and beside it times the factors; added in float32 or wider.

    Args:
      product: `awq_jax.kernels.matmul` for the packed weight.
    """
    base, wide = q.base(), jnp.promote_types(out_dtype, jnp.float32)
    if isinstance(base, QuantizedTensor):
        y = product(x, base, preferred_element_type=wide)
    else:
        y = _dot(_rows(x, base.ndim - 2), base, wide).reshape(*x.shape[:-1], q.n)
    y = y + low_rank(x, q, wide)
    return (y if bias is None else y + bias.astype(wide)).astype(out_dtype)


def low_rank(x: jax.Array, q: Adapted, dtype: DTypeLike) -> jax.Array:
    """``(x A) B`` for ``x [*B, ..., K]``.

    Raises:
      ShapeError: the rows of ``x`` are not those whose adapters are named.
    """
    a, b = jnp.asarray(q.a), jnp.asarray(q.b)
    if q.row is None:
        flat = _rows(x, len(q.batch))
        return _dot(_dot(flat, a, dtype), b, dtype).reshape(*x.shape[:-1], q.n)
    rows = len(q.row)
    if len(q.batch) or x.ndim < 2 or x.shape[0] % rows:
        raise ShapeError(f"activations {x.shape} are not those of {rows} rows that have adapters of their own")
    own = jnp.maximum(jnp.asarray(q.row), 0)
    flat = x.reshape(rows, -1, x.shape[-1])  # rows may have been laid out one after another
    y = _dot(_dot(flat, a[own], dtype), b[own], dtype)
    y = jnp.where((jnp.asarray(q.row) >= 0)[:, None, None], y, 0)
    return y.reshape(*x.shape[:-1], q.n)


def low_rank_by_expert(x: jax.Array, q: Adapted, expert: jax.Array, dtype: DTypeLike) -> jax.Array:
    """``(x A) B`` where each row of ``x [T, K]`` has the factors of its expert, int32 ``[T]``; 0 where that is -1."""
    return rows_by_expert(x, [jnp.asarray(q.a), jnp.asarray(q.b)], expert, dtype)


def rows_by_expert(x: jax.Array, factors: Sequence[jax.Array], expert: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows ``x [T, K]`` times float matrices ``[E, K, N]`` of their experts, one after the other; 0 for expert -1."""
    experts = len(factors[0])
    order = jnp.argsort(jnp.where(expert < 0, experts, expert), stable=True)
    sizes = jnp.zeros(experts, jnp.int32).at[expert].add((expert >= 0).astype(jnp.int32))
    y = x[order].astype(dtype)
    for f in factors:
        y = lax.ragged_dot(y, f.astype(dtype), sizes)
    y = jnp.where((expert[order] >= 0)[:, None], y, 0)
    return jnp.zeros_like(y).at[order].set(y)


def _rows(x: jax.Array, batch: int) -> jax.Array:
    return x.reshape(*x.shape[:batch], -1, x.shape[-1])


def _dot(x: jax.Array, w: jax.Array, dtype: DTypeLike) -> jax.Array:
    """``[*B, m, K] @ [*B, K, N]`` in the wider of their dtypes, accumulated in ``dtype``."""
    both = jnp.promote_types(x.dtype, w.dtype)
    return jnp.matmul(x.astype(both), w.astype(both), preferred_element_type=dtype)
