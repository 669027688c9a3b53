"""Mixture of experts: each row times the packed matrix of its own expert.

A few rows (decoding) fetch their experts' packed weights. Many rows (a prompt) are sorted by expert and cut
into tiles of one expert each, so that a matrix is dequantized once for a tile, and one at a time: neither the
float weights of all experts nor the products of all rows with all experts ever exist.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from awq_jax.errors import ShapeError
from awq_jax.kernels import adapted, dispatch
from awq_jax.kernels.parallel import vary_as
from awq_jax.qtensor import QuantizedTensor

FEW_ROWS = 16  # up to here every row fetches its expert
SMALLEST_TILE, LARGEST_TILE = 16, 256


def matmul(
    x: jax.Array,
    q: QuantizedTensor,
    expert: jax.Array,
    *,
    impl: str = "auto",
    preferred_element_type: DTypeLike | None = None,
    sparse: bool = False,
) -> jax.Array:
    """Row t of ``x`` times matrix ``expert[t]``, accumulated in float32; differentiable with respect to ``x``.

    Args:
      x: float ``[T, K]``.
      q: packed weight ``[E, K, N]``.
      expert: int32 ``[T]``, from 0 to E-1.
      impl: as `awq_jax.kernels.matmul`, for the product of one tile.
      preferred_element_type: dtype of the result (default: ``x.dtype``).
      sparse: many rows have no expert, which is then -1: they are not multiplied, and their results mean nothing.

    Returns:
      ``[T, N]``.

    Raises:
      ShapeError: if the shapes do not fit.
      BackendError: if ``impl`` is unknown or cannot run this.
    """
    dispatch.check_impl(impl)
    if len(q.batch) != 1 or x.ndim != 2 or x.shape[-1] != q.k or expert.shape != x.shape[:1]:
        raise ShapeError(
            f"rows {x.shape} of experts {expert.shape} do not fit a packed weight of shape {q.shape} (axes "
            f"{q.live_axes!r}): expected [T, {q.k}], [T] and [experts, {q.k}, ...]"
        )
    out_dtype = jnp.dtype(preferred_element_type or x.dtype)
    if isinstance(q, adapted.Adapted):
        return _adapted(x, q, expert, impl, out_dtype, sparse)
    if q.inv_scale is not None:
        x = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * q.inv_scale[expert]).astype(x.dtype)
    if q.perm is not None:
        x = jnp.take_along_axis(x, q.perm[expert], axis=-1)
    q = dataclasses.replace(q, inv_scale=None, perm=None)
    if not len(x):
        return jnp.zeros((0, q.n), out_dtype)
    request = dispatch.Request(len(x), q, x.dtype, dispatch.platform_of(x))
    kernel = dispatch.pick(request, impl).experts  # fetches the experts' blocks by itself
    if len(x) <= FEW_ROWS and kernel is None and not sparse:
        one = jax.tree.map(lambda a: a[expert], q)
        return dispatch.matmul(x[:, None], one, impl=impl, preferred_element_type=out_dtype)[:, 0]
    rows = tile_rows(len(x), q.batch[0])
    experts = q.batch[0]
    if sparse:  # as if there were one expert more, whose tiles are passed over
        slots, owner = tiles(jnp.where(expert < 0, experts, expert), experts + 1, rows)
        owner = jnp.where(owner == experts, -1, owner)
    else:
        slots, owner = tiles(expert, experts, rows)
    tiled = jnp.zeros((len(owner) * rows, q.k), x.dtype).at[slots].set(x).reshape(-1, rows, q.k)
    y = _scan(tiled, q, owner, impl, out_dtype) if kernel is None else kernel(tiled, request, owner, out_dtype)
    return y.reshape(-1, q.n)[slots]


def _adapted(
    x: jax.Array, q: adapted.Adapted, expert: jax.Array, impl: str, out_dtype: DTypeLike, sparse: bool
) -> jax.Array:
    wide, base = jnp.promote_types(out_dtype, jnp.float32), q.base()
    if isinstance(base, QuantizedTensor):
        y = matmul(x, base, expert, impl=impl, preferred_element_type=wide, sparse=sparse)
    else:
        y = adapted.rows_by_expert(x, [base], expert, wide)
    return (y + adapted.low_rank_by_expert(x, q, expert, wide)).astype(out_dtype)


def tile_rows(rows: int, experts: int) -> int:
    """Rows of a tile: about as many as an expert has, a power of two."""
    return min(LARGEST_TILE, max(SMALLEST_TILE, 1 << (-(-rows // experts) - 1).bit_length()))


def tiles(expert: jax.Array, experts: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """Where each row stands when rows are put, expert by expert, into tiles of ``rows``.

    Args:
      expert: int32 ``[T]``.
      experts: E.
      rows: R.

    Returns:
      Slots int32 ``[T]``, all different: row t of ``x`` is row ``slots[t] % R`` of tile ``slots[t] // R``; and
      the expert of each tile, -1 after the last. There are as many tiles as the worst routing takes.
    """
    total = len(expert)
    # An expert that has rows leaves at most ``rows - 1`` places of its last tile empty.
    most = (total + (rows - 1) * min(experts, total)) // rows
    counts = jnp.zeros(experts, jnp.int32).at[expert].add(1)
    ends = jnp.cumsum(-(-counts // rows))  # in tiles
    order = jnp.argsort(expert, stable=True)
    sorted_expert = expert[order]
    rank = jnp.arange(total, dtype=jnp.int32) - (jnp.cumsum(counts) - counts)[sorted_expert]
    first = (ends - -(-counts // rows))[sorted_expert] * rows
    slots = jnp.zeros(total, jnp.int32).at[order].set(first + rank)
    index = jnp.arange(most, dtype=jnp.int32)
    owner = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
    return slots, jnp.where(index < ends[-1], owner, -1)


def _scan(tiled: jax.Array, q: QuantizedTensor, owner: jax.Array, impl: str, out_dtype: DTypeLike) -> jax.Array:
    """``[tiles, R, K]`` times the matrices of their experts, one after the other."""

    def product(x: jax.Array, e: jax.Array) -> jax.Array:
        one = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, e, keepdims=False), q)
        return dispatch.matmul(x, one, impl=impl, preferred_element_type=out_dtype)

    # Inside shard_map both branches must differ along the same axes of the mesh.
    all_arrays = jax.tree.leaves((tiled, q, owner))

    def empty(x: jax.Array, e: jax.Array) -> jax.Array:
        return vary_as(jnp.zeros((len(x), q.n), out_dtype), *all_arrays)

    def step(_: None, tile: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        x, e = tile
        return None, lax.cond(e >= 0, product, empty, x, e)

    return lax.scan(step, None, (tiled, owner))[1]
