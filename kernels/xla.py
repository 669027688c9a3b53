"""Packed matmul in plain XLA: runs everywhere, has gradients, vmaps and shards like any JAX code."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from awq_jax.kernels.backend import Backend
from awq_jax.kernels.parallel import sum_as, vary_as
from awq_jax.pack import Array
from awq_jax.qtensor import QuantizedTensor

Saved = tuple[jax.Array, QuantizedTensor]  # for the gradient: the operands

GROUPED_ROWS = 64  # above this the [m, groups, N] partial sums cost more than the dequantized weight
MMA_ROWS = 2  # XLA on CUDA makes a tensor-core product of so many rows; for one row it would write out the weight
TILE = 1 << 23  # weights dequantized at once
CPU_TILE = 1 << 21  # so many stay in its caches until they are multiplied, and their memory is not asked for anew
SMALL = 1 << 13  # numbers of a weight that need not be kept out of memory
COLUMNS = 128  # a tile has a multiple of so many


def form(m: int, platform: str) -> tuple[str, str]:
    """Which of the two forms suits ``m`` activation rows on ``platform``.

    Returns:
      (``"grouped"`` or ``"dequantize"``, the reason).
    """
    if platform not in ("cuda", "gpu", "rocm"):
        return "dequantize", f"on {platform} XLA writes out what it dequantizes in either form"
    if m > GROUPED_ROWS:
        return "dequantize", f"{m} rows are bound by arithmetic, not by reading the weight"
    return "grouped", f"{m} rows are bound by reading the weight, which this form does not materialise"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, q: QuantizedTensor, out_dtype: DTypeLike, platform: str) -> jax.Array:
    """``x [*B, m, K] @ q [*B, K, N]`` in the form that suits; ``inv_scale`` and ``perm`` are not applied here."""
    if form(x.shape[-2], platform)[0] == "grouped":
        return grouped(x, q, out_dtype)
    if platform == "cpu":  # multiplies in float32 anyway
        x = x.astype(_accumulator(x))
    return tiled(x, q, jnp.dtype(out_dtype), tile_size(platform), least_tiles(platform))


def _backward(out_dtype: DTypeLike, platform: str, saved: Saved, dy: jax.Array) -> tuple[jax.Array, QuantizedTensor]:
    x, q = saved
    return gradient(x, q, dy, platform), weight_gradient(x, q, dy, platform)


# Else what is kept for the gradient is every dequantized weight of a model.
matmul.defvjp(lambda *args: (matmul(*args), args[:2]), _backward)


def gradient(x: jax.Array, q: QuantizedTensor, dy: jax.Array, platform: str) -> jax.Array:
    """The cotangent ``[*B, m, K]`` of ``x``, in its dtype, for ``dy [*B, m, N]``, that of the product; tile by tile."""
    wide = _accumulator(x) if platform == "cpu" else x.dtype  # as in `matmul`
    tiles = tile_size(platform), least_tiles(platform)
    return sum_as(transposed(dy.astype(wide), q, x.dtype, *tiles), x)


def weight_gradient(x: jax.Array, q: QuantizedTensor, dy: jax.Array, platform: str) -> QuantizedTensor:
    """The cotangent of ``q``: of its scales and offsets, tile by tile; nothing else in it can change a little."""

    def nothing(a: jax.Array) -> Array:
        return jnp.zeros_like(a) if jnp.issubdtype(a.dtype, jnp.floating) else np.zeros(a.shape, jax.dtypes.float0)

    found = _table_gradients(x, q, dy, tile_size(platform))
    given: dict[str, Any] = {name: sum_as(d, getattr(q, name)) for name, d in found.items()}
    return dataclasses.replace(jax.tree.map(nothing, q), **given)


def dequantize(x: jax.Array, q: QuantizedTensor, out_dtype: DTypeLike) -> jax.Array:
    """Dequantize to ``x.dtype``, then one dense dot accumulated in float32 (or wider).

    Args:
      x: float ``[*B, m, K]``.
      q: weight ``[*B, K, N]``.
      out_dtype: dtype of the result.

    Returns:
      ``[*B, m, N]``.
    """
    # Otherwise the weights, which depend on nothing, may all be dequantized at the start of the program.
    x, q = lax.optimization_barrier((x, q))
    return _batched_dot(x, q.dequantize_canonical(x.dtype)).astype(out_dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))  # outside of jit the loop would be compiled at every call
def tiled(x: jax.Array, q: QuantizedTensor, out_dtype: DTypeLike, tile: int = TILE, least: int = 1) -> jax.Array:
    """`dequantize`, at most about ``tile`` weights at a time, one tile of columns after the other.

    The loop also keeps XLA on CUDA from writing out two weights in one fusion because they wait for the same ``x``.
    Of a tile that would end beyond the last column, columns that are there already are made again.
    """
    tiles = _Tiles.of(q, tile, least)
    if tiles.number < 2:
        return dequantize(x, q, out_dtype)

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        part = dequantize(x, _columns(q, tiles.start(i), tiles.width), out_dtype)
        return lax.dynamic_update_slice_in_dim(y, part, tiles.start(i), axis=-1)

    y = jnp.zeros((*x.shape[:-1], q.n), out_dtype)
    return lax.fori_loop(0, tiles.number, step, vary_as(y, x, *jax.tree.leaves(q)))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def transposed(dy: jax.Array, q: QuantizedTensor, out_dtype: DTypeLike, tile: int = TILE, least: int = 1) -> jax.Array:
    """``dy [*B, m, N]`` times the transpose of ``q``, ``[*B, m, K]``: dequantized to ``dy.dtype`` as in `tiled`."""
    # In a loop, or XLA takes the weight for that of the forward pass, and keeps it from there.
    tiles = _Tiles.of(q, tile, max(least, 2))
    if tiles.number < 2:
        dy, q = lax.optimization_barrier((dy, q))
        return _batched_dot(dy, q.dequantize_canonical(dy.dtype), transpose=True).astype(out_dtype)

    def step(i: jax.Array, dx: jax.Array) -> jax.Array:
        w = _columns(q, tiles.start(i), tiles.width).dequantize_canonical(dy.dtype)
        part = lax.dynamic_slice_in_dim(dy, tiles.start(i), tiles.width, axis=-1)
        part = jnp.where(tiles.start(i) + jnp.arange(tiles.width) < i * tiles.width, 0, part)  # counted already
        return dx + _batched_dot(part, w, transpose=True)

    dx = jnp.zeros((*dy.shape[:-1], q.k), _accumulator(dy))
    return lax.fori_loop(0, tiles.number, step, vary_as(dx, dy, *jax.tree.leaves(q))).astype(out_dtype)


@functools.partial(jax.jit, static_argnums=3)
def _table_gradients(x: jax.Array, q: QuantizedTensor, dy: jax.Array, tile: int) -> dict[str, jax.Array]:
    tiles, leaves = _Tiles.of(q, tile), jax.tree.leaves(q)

    def step(i: jax.Array, found: dict[str, jax.Array]) -> dict[str, jax.Array]:
        start = tiles.start(i)
        part = _columns(q, start, tiles.width)
        mine = lax.dynamic_slice_in_dim(dy, start, tiles.width, axis=-1)
        names = list(found)

        def product(*tables: jax.Array) -> jax.Array:
            own: dict[str, Any] = dict(zip(names, tables, strict=True))
            return dequantize(x, dataclasses.replace(part, **own), dy.dtype)

        # Varying like the product, or their gradients would be summed over a mesh here already.
        parts = jax.vjp(product, *(vary_as(getattr(part, name), x, dy, *leaves) for name in names))[1](mine)
        return {
            name: lax.dynamic_update_slice_in_dim(found[name], d, start, axis=-1)
            for name, d in zip(names, parts, strict=True)
        }

    tables = {"scales": q.scales} | ({} if q.offsets is None else {"offsets": q.offsets})
    zeros = {name: vary_as(jnp.zeros_like(t), x, dy, *leaves) for name, t in tables.items()}
    return lax.fori_loop(0, tiles.number, step, zeros)


def tile_size(platform: str) -> int:
    """Weights dequantized at once."""
    return CPU_TILE if platform == "cpu" else TILE


def least_tiles(platform: str) -> int:
    """Tiles of a weight of more than `SMALL` numbers.

    On CPU XLA, to have work for more threads, writes out the weights of all layers at once unless they are in loops.
    """
    return 4 if platform == "cpu" else 1


class _Tiles(NamedTuple):
    """``number`` tiles of ``width`` columns out of ``n``, of which the last may reach back."""

    number: int
    width: int
    n: int

    @classmethod
    def of(cls, q: QuantizedTensor, size: int, least: int = 1) -> _Tiles:
        """Of at most about ``size`` weights; ``least`` of them if there are more than `SMALL`."""
        least = least if math.prod(q.batch) * q.k * q.n > SMALL else 1
        most = max(size // max(math.prod(q.batch) * q.k, 1) // COLUMNS, 1) * COLUMNS
        number = max(-(-q.n // most), min(least, q.n))
        unit = COLUMNS if q.n >= number * COLUMNS else 1
        width = min(q.n, -(-q.n // max(number * unit, 1)) * unit)
        return cls(-(-q.n // max(width, 1)), width, q.n)

    def start(self, i: jax.Array) -> jax.Array:
        return jnp.minimum(i * self.width, self.n - self.width)


def _columns(q: QuantizedTensor, start: jax.Array, width: int) -> QuantizedTensor:
    """``width`` columns of ``q`` from ``start``."""

    tables: dict[str, Any] = {
        field: lax.dynamic_slice_in_dim(a, start, width, -2 if field == "qweight" and q.layout == "cuda" else -1)
        for field in ("qweight", "scales", "zeros", "offsets")
        if (a := getattr(q, field)) is not None
    }
    return dataclasses.replace(q, **tables, axes="b" * len(q.batch) + "kn", k_dims=(q.k,), n_dims=(width,))


def grouped(x: jax.Array, q: QuantizedTensor, out_dtype: DTypeLike) -> jax.Array:
    """One small dot per group with signed integer codes; scales and zero points are applied after.

    ``y = Σ_g s_g (x_g · c_g − (Σ x_g) (z_g − h))`` with ``c = q − h``, ``h = 2**(bits-1)`` (an offset
    ``o_g`` instead of a zero point adds ``(Σ x_g) (h s_g + o_g)``): codes
    are exact in bfloat16, so nothing but the sums is rounded, and XLA on CUDA converts the codes
    inside the dot's operand load instead of writing the dequantized weight to memory.

    Args:
      x: float ``[*B, m, K]``.
      q: weight ``[*B, K, N]``.
      out_dtype: dtype of the result.

    Returns:
      ``[*B, m, N]``.
    """
    x, q = lax.optimization_barrier((x, q))  # as above: the codes of all weights would be unpacked at once
    *lead, m, k = x.shape
    groups, g = q.scales.shape[-2], q.group_size
    acc = _accumulator(x)
    rows = max(m, MMA_ROWS)
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, rows - m), (0, groups * g - k)])
    xg = jnp.moveaxis(x.reshape(*lead, rows, groups, g), -2, -3)
    c = _signed_codes(q).reshape(*lead, groups, g, q.n).astype(x.dtype)
    y = _batched_dot(xg, c)
    scales, half, sums = q.scales.astype(acc)[..., :, None, :], 2 ** (q.bits - 1), xg.sum(-1, dtype=acc)[..., None]
    if q.zeros is not None:
        y = y - sums * (q.zeros.astype(acc) - half)[..., :, None, :]
    y = y * scales
    if q.offsets is not None:
        y = y + sums * (half * scales + q.offsets.astype(acc)[..., :, None, :])
    y = y.sum(-3)
    return y[..., :m, :].astype(out_dtype)


def _signed_codes(q: QuantizedTensor) -> jax.Array:
    """``code - 2**(bits-1)`` as ``[*B, Kp, N]``, int4 where it fits: XLA then streams half the bytes."""
    if q.bits == 8:
        return lax.bitcast_convert_type(q.codes() ^ jnp.uint8(0x80), jnp.int8)
    return (q.codes().astype(jnp.int8) - 2 ** (q.bits - 1)).astype(jnp.int4 if q.bits <= 4 else jnp.int8)


def _batched_dot(a: jax.Array, b: jax.Array, transpose: bool = False) -> jax.Array:
    """``[*B, m, k] @ [*B, k, n]`` (transpose: ``[*B, n, k]``), accumulated, and returned, in float32 (or wider)."""
    lead, acc = tuple(range(a.ndim - 2)), _accumulator(a)
    dims = (((a.ndim - 1,), (a.ndim - (1 if transpose else 2),)), (lead, lead))

    def native(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.dot_general(a, b, dims, preferred_element_type=acc)

    if a.dtype == acc:
        return native(a, b)
    # XLA:CPU has no batched dot of 16-bit operands with a 32-bit result. The platform is only known
    # for certain when the program is lowered, so that is when this is decided.
    return lax.platform_dependent(a, b, cpu=lambda a, b: native(a.astype(acc), b.astype(acc)), default=native)


def _accumulator(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(jnp.float32, x.dtype)


BACKEND = Backend(
    name="xla",
    obstacle=lambda r: None,
    describe=lambda r: "{}: {}".format(*form(r.m, r.platform)),
    run=lambda x, r, out_dtype: matmul(x, r.q, out_dtype, r.platform),
)
