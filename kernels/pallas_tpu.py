"""Packed matmul on TPU (Pallas, Mosaic): dequantizes tiles of the canonical words in VMEM, next to the matrix unit.

One kernel serves plain weights, batches of weights and experts: rows stand in tiles, and a table that is
fetched ahead of the grid says which matrix a tile is multiplied by.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from awq_jax.kernels import xla
from awq_jax.qtensor import QuantizedTensor

LANES = 128  # columns of a vector register; blocks are multiples of it
BLOCK_K = 1024  # 8 rows of scales at groups of 128: the fewest a block may have
BLOCK_N = 1024
PREFILL_N = 512  # with many rows the accumulator and the dequantized tile share VMEM
FEWEST_ROWS = 16  # of a tile: a packed vector register of bfloat16
MOST_ROWS = 512
SUMS_ROWS = 64  # up to here scaling the sums is less work than scaling the weights


@dataclasses.dataclass(frozen=True)
class Tile:
    """The blocks of one call.

    Attributes:
      rows, k, n: rows of activations, contracted rows and columns of one block.
      sums: the codes are multiplied as they are, and each group's sums are scaled; otherwise the
        weight is dequantized to the activation's dtype first.
    """

    rows: int
    k: int
    n: int
    sums: bool


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the words of a weight mean, as in `QuantizedTensor`."""

    bits: int
    group_size: int
    groups: int
    zeros: bool
    offsets: bool


def obstacle(q: QuantizedTensor, dtype: Any) -> str | None:
    """Why the kernel cannot multiply activations of ``dtype`` by ``q``, or None if it can."""
    if q.bits not in (4, 8):
        return f"{q.bits}-bit codes do not fill TPU registers; 4 and 8 bits do"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"no TPU multiplies {jnp.dtype(dtype)}"
    groups, g = q.scales.shape[-2], q.group_size
    if groups > 1 and (g & (g - 1) or not 16 <= g <= 256):
        return f"groups of {g} rows do not divide a tile; 16, 32, 64, 128, 256 and the whole column do"
    if q.n < LANES:
        return f"{q.n} columns do not fill a register of {LANES}"
    if groups * g < BLOCK_K and groups * g % 64:
        return f"{groups * g} rows are less than a tile and no multiple of 64"
    return None


def tile(rows: int, q: QuantizedTensor, dtype: Any) -> Tile:
    """Blocks for ``rows`` activation rows of ``dtype`` per matrix."""
    groups, g = q.scales.shape[-2], q.group_size
    most = MOST_ROWS if jnp.dtype(dtype) == jnp.bfloat16 else MOST_ROWS // 2
    high = min(most, max(FEWEST_ROWS, 1 << (rows - 1).bit_length()))
    few = high <= SUMS_ROWS
    wide = BLOCK_N if few else PREFILL_N
    deep = BLOCK_K if groups == 1 else max(BLOCK_K, 8 * g)
    return Tile(high, min(deep, groups * g), min(wide, q.n // LANES * LANES), few and g >= LANES)


def describe(m: int, q: QuantizedTensor, dtype: Any) -> str:
    """One line on how ``m`` rows would be multiplied."""
    t = tile(m, q, dtype)
    how = "scales applied to sums" if t.sums else "dequantized in VMEM"
    return f"tiles of {t.rows} x {t.k} x {t.n}, {how}"


def matmul(x: jax.Array, q: QuantizedTensor, out_dtype: Any, interpret: Any = False) -> jax.Array:
    """``x @ q``, accumulated in float32, differentiable; ``inv_scale`` and ``perm`` are not applied here.

    Args:
      x: float ``[*B, m, K]``.
      q: weight ``[*B, K, N]`` without an `obstacle`.
      out_dtype: dtype of the result.
      interpret: `pltpu.InterpretParams` to run without a TPU.

    Returns:
      ``[*B, m, N]``.
    """
    lead, (m, k) = x.shape[:-2], x.shape[-2:]
    if 0 in (*lead, m):
        return jnp.zeros((*lead, m, q.n), out_dtype)
    many = math.prod(lead)
    q = jax.tree.map(lambda a: a.reshape(many, *a.shape[len(lead) :]), _bare(q))
    return _batched(jnp.dtype(out_dtype), interpret, x.reshape(many, m, k), q).reshape(*lead, m, q.n)


def experts(x: jax.Array, q: QuantizedTensor, expert: jax.Array, out_dtype: Any, interpret: Any = False) -> jax.Array:
    """Tiles of rows, each times the matrix of its expert; reads no expert that has no tile.

    Args:
      x: float ``[T, R, K]``; R is 16, 32, 64, 128 or 256.
      q: weight ``[E, K, N]`` without an `obstacle`.
      expert: int32 ``[T]``; a negative number skips the tile, whose result is then undefined.
      out_dtype: dtype of the result.
      interpret: as in `matmul`.

    Returns:
      ``[T, R, N]``.
    """
    return _experts(jnp.dtype(out_dtype), interpret, x, _bare(q), expert)


def _bare(q: QuantizedTensor) -> QuantizedTensor:
    """Only what the kernel reads, as ``[..., K, N]``."""
    lead = "b" * len(q.batch)
    return dataclasses.replace(q, inv_scale=None, perm=None, axes=lead + "kn", k_dims=(q.k,), n_dims=(q.n,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _batched(out_dtype: Any, interpret: Any, x: jax.Array, q: QuantizedTensor) -> jax.Array:
    """``x [B, m, K] @ q [B, K, N]``. A vmap becomes more rows of the same weight, or more weights."""

    @custom_vmap
    def run(x: jax.Array, q: QuantizedTensor) -> jax.Array:
        many, m, k = x.shape
        t = tile(m, q, x.dtype)
        per = -(-m // t.rows)
        x = jnp.pad(x, ((0, 0), (0, per * t.rows - m), (0, 0))).reshape(many * per, t.rows, k)
        which = jnp.repeat(jnp.arange(many, dtype=jnp.int32), per)
        return _call(x, q, which, t, out_dtype, interpret).reshape(many, per * t.rows, -1)[:, :m]

    @run.def_vmap
    def _(size: int, mapped: Any, x: jax.Array, q: QuantizedTensor) -> tuple[jax.Array, bool]:
        x_mapped, q_mapped = mapped
        if not any(jax.tree.leaves(q_mapped)):
            y = run(jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, x.shape[-1]), q)
            return jnp.moveaxis(y.reshape(y.shape[0], size, -1, y.shape[-1]), 1, 0), True

        def flat(a: jax.Array, has: bool) -> jax.Array:
            a = a if has else jnp.broadcast_to(a, (size, *a.shape))
            return a.reshape(-1, *a.shape[2:])

        y = run(flat(x, x_mapped), jax.tree.map(flat, q, q_mapped))
        return y.reshape(size, -1, *y.shape[1:]), True

    return run(x, q)


def _batched_forward(out_dtype: Any, interpret: Any, x: jax.Array, q: QuantizedTensor) -> Any:
    return _batched(out_dtype, interpret, x, q), (x, q)


def _batched_backward(out_dtype: Any, interpret: Any, saved: Any, dy: jax.Array) -> Any:
    # Many rows and no decode: XLA's dense product of the dequantized weight is as good.
    x, q = saved
    return xla.gradient(x, q, dy, "tpu"), xla.weight_gradient(x, q, dy, "tpu")


_batched.defvjp(_batched_forward, _batched_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts(out_dtype: Any, interpret: Any, x: jax.Array, q: QuantizedTensor, expert: jax.Array) -> jax.Array:
    t = dataclasses.replace(tile(x.shape[1], q, x.dtype), rows=x.shape[1])
    return _call(x, q, expert, t, out_dtype, interpret)


def _experts_forward(out_dtype: Any, interpret: Any, x: jax.Array, q: QuantizedTensor, expert: jax.Array) -> Any:
    return _experts(out_dtype, interpret, x, q, expert), (x, q, expert)


def _experts_backward(out_dtype: Any, interpret: Any, saved: Any, dy: jax.Array) -> Any:
    def one(_: None, tile: Any) -> tuple[None, jax.Array]:
        x, q, expert = tile
        return None, xla.dequantize(x, jax.tree.map(lambda a: a[jnp.maximum(expert, 0)], q), out_dtype)

    x, q, expert = saved

    def forward(x: jax.Array, q: QuantizedTensor) -> jax.Array:
        y = lax.scan(lambda c, t: one(c, (t[0], q, t[1])), None, (x, expert))[1]
        return jnp.where(expert[:, None, None] < 0, 0, y)

    return (*jax.vjp(forward, x, q)[1](dy), None)


_experts.defvjp(_experts_forward, _experts_backward)


def _call(x: jax.Array, q: QuantizedTensor, which: jax.Array, t: Tile, out_dtype: Any, interpret: Any) -> jax.Array:
    """``x [T, R, K]``, tile i times matrix ``which[i]`` of ``q [E, K, N]``, as ``[T, R, N]``."""
    if x.dtype == jnp.float16:  # Mosaic has no float16
        x = x.astype(jnp.float32)
    narrow, out_dtype = out_dtype, jnp.dtype(jnp.float32) if out_dtype == jnp.float16 else out_dtype
    tiles, rows, k = x.shape
    groups, n = q.scales.shape[-2:]
    steps = -(-groups * q.group_size // t.k)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, steps * t.k - k)))
    per = max(1, t.k // q.group_size)  # groups in a block
    kind = Kind(q.bits, q.group_size, groups, q.zeros is not None, q.offsets is not None)
    tables = [_words(q.scales)]
    tables += [_words(a) for a in (q.zeros, q.offsets) if a is not None]

    def matrix(b: Any, j: Any, i: Any, which: Any) -> tuple[Any, Any, Any]:
        live = which[b] >= 0  # a skipped tile stays at one block, which is fetched once
        return jnp.maximum(which[b], 0), jnp.where(live, i, 0), jnp.where(live, j, 0)

    def table(b: Any, j: Any, i: Any, which: Any) -> tuple[Any, Any, Any]:
        e, i, j = matrix(b, j, i, which)
        return e, i if groups > 1 else 0, j

    scratch = [pltpu.VMEM((rows, t.n), jnp.float32)]
    if not t.sums:
        scratch.append(pltpu.VMEM((t.k, t.n), x.dtype))
    words = t.k * q.bits // 32
    call = pl.pallas_call(
        functools.partial(_kernel, kind=kind, per=per, steps=steps, sums=t.sums),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles, -(-n // t.n), steps),
            in_specs=[
                pl.BlockSpec((None, rows, t.k), lambda b, j, i, which: (b, 0, i)),
                pl.BlockSpec((None, words, t.n), matrix),
                *[pl.BlockSpec((None, per, t.n), table) for _ in tables],
            ],
            out_specs=pl.BlockSpec((None, rows, t.n), lambda b, j, i, which: (b, 0, j)),
            scratch_shapes=scratch,
        ),
        out_shape=_like((tiles, rows, n), out_dtype, which, x, q),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * tiles * rows * k * n,
            transcendentals=0,
            bytes_accessed=x.nbytes + tiles * (q.nbytes // q.batch[0] + rows * n * jnp.dtype(out_dtype).itemsize),
        ),
        interpret=interpret,
        name=f"awq_matmul_w{q.bits}",
    )
    return call(which, x, q.qweight, *tables).astype(narrow)


def _kernel(which: Any, x: Any, words: Any, scales: Any, *refs: Any, kind: Kind, per: int, steps: int, sums: bool):
    """One block of one tile: ``acc += x @ w``, written out behind the last block along K.

    With codes ``c = q - half`` every weight is ``c * s + o`` for an ``o`` per group and column.
    """
    shifts, out, acc, *rest = refs if kind.zeros or kind.offsets else (None, *refs)
    step, half = pl.program_id(2), 2.0 ** (kind.bits - 1)
    dtype, rows = x.dtype, min(kind.group_size, x.shape[1])
    exact = lax.Precision.HIGHEST if dtype == jnp.float32 else None

    @pl.when(step == 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)

    @pl.when(which[pl.program_id(0)] >= 0)
    def _() -> None:
        s, o = _float(scales[...]), None
        if kind.zeros:
            o = (half - _float(shifts[...])) * s
        elif kind.offsets:
            o = half * s + _float(shifts[...])
        if kind.groups > 1 and kind.groups % per:
            left = kind.groups - step * per
            s, o = _inside(s, left), None if o is None else _inside(o, left)
        c = _signed(words[...], kind.bits)
        total = acc[...]
        for g in range(per):
            part = slice(g * rows, (g + 1) * rows)
            codes = c[part].astype(jnp.float32)
            if sums:
                y = jnp.dot(x[:, part], codes.astype(dtype), preferred_element_type=jnp.float32, precision=exact)
                total += y * s[g : g + 1]
                if o is not None:
                    total += x[:, part].astype(jnp.float32).sum(axis=1, keepdims=True) * o[g : g + 1]
            else:
                w = codes * s[g : g + 1]
                rest[0][part] = (w if o is None else w + o[g : g + 1]).astype(dtype)
        if not sums:
            total += jnp.dot(x[...], rest[0][...], preferred_element_type=jnp.float32, precision=exact)
        acc[...] = total

    @pl.when(step == steps - 1)
    def _() -> None:
        out[...] = acc[...].astype(out.dtype)


def _inside(table: jax.Array, rows: Any) -> jax.Array:
    """The first ``rows`` rows; behind the last group stands whatever memory holds, NaN too."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, table.shape, 0) < rows, table, 0.0)


def _signed(words: jax.Array, bits: int) -> jax.Array:
    """uint32 ``[R, N]`` to signed codes ``q - 2**(bits-1)`` as int4 or int8 ``[R * 32 / bits, N]``."""
    flip, narrow = (0x88888888, jnp.int4) if bits == 4 else (0x80808080, jnp.int8)
    return pltpu.bitcast(words ^ jnp.uint32(flip), narrow)


def _words(table: jax.Array) -> jax.Array:
    """A table as the kernel reads it: float16, which Mosaic does not have, as its bits."""
    return lax.bitcast_convert_type(table, jnp.uint16) if table.dtype == jnp.float16 else table


def _float(table: jax.Array) -> jax.Array:
    """A block of a table as float32."""
    if table.dtype == jnp.uint8:
        return table.astype(jnp.int32).astype(jnp.float32)
    if table.dtype != jnp.uint16:
        return table.astype(jnp.float32)
    bits = table.astype(jnp.int32)
    exponent, mantissa = (bits >> 10) & 31, (bits & 1023).astype(jnp.float32)
    normal = lax.bitcast_convert_type((bits & 0x7FFF) << 13, jnp.float32) * 2.0**112
    size = jnp.where(exponent == 0, mantissa * 2.0**-24, normal)
    return jnp.where(bits >= 0x8000, -size, size)


def _like(shape: tuple[int, ...], dtype: Any, *operands: Any) -> jax.ShapeDtypeStruct:
    """The type of a result; under `jax.shard_map` it varies over the axes that any operand varies over."""
    first = lambda a: a.reshape(-1)[0].astype(dtype)  # noqa: E731
    return jax.eval_shape(lambda *a: jnp.zeros(shape, dtype) + sum(map(first, jax.tree.leaves(a))), *operands)
