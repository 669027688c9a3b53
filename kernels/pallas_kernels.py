"""The TPU program (Pallas, Mosaic) and its call. Importing Pallas takes a quarter of the time that JAX itself does, so
`awq_jax.kernels.pallas_tpu` imports this only when it runs it.

Rows stand in tiles, and a table that is fetched ahead of the grid says which matrix a tile is multiplied by: so one
kernel serves plain weights, batches of weights and experts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from awq_jax.pack import Array
from awq_jax.qtensor import QuantizedTensor

Index = jax.Array | int  # of a block, in an index map


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """What the kernel is compiled for, of a weight; fields are as in `QuantizedTensor`."""

    bits: int
    group_size: int
    groups: int
    zeros: bool
    offsets: bool


def call(
    x: jax.Array,
    q: QuantizedTensor,
    which: jax.Array,
    block: tuple[int, int],
    sums: bool,
    out_dtype: DTypeLike,
    interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
    """Tiles of rows, each times its own matrix.

    Args:
      x: bfloat16, float16 or float32 ``[T, R, K]``.
      q: weight ``[E, K, N]`` in the canonical layout.
      which: int32 ``[T]``, the matrix of each tile; a negative number skips the tile.
      block: contracted rows and columns of the weight that are in VMEM at a time.
      sums: scale the sums of each group; otherwise the weight is dequantized to ``x.dtype`` first.
      out_dtype: dtype of the result.
      interpret: run without a TPU.

    Returns:
      ``[T, R, N]``.
    """
    block_k, block_n = block
    if x.dtype == jnp.float16:  # Mosaic has no float16
        x = x.astype(jnp.float32)
    wide = jnp.dtype(jnp.float32 if out_dtype == jnp.float16 else out_dtype)
    tiles, rows, k = x.shape
    groups, n = q.scales.shape[-2:]
    steps = -(-groups * q.group_size // block_k)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, steps * block_k - k)))
    per = max(1, block_k // q.group_size)  # groups in a block
    spec = WeightSpec(q.bits, q.group_size, groups, q.zeros is not None, q.offsets is not None)
    tables = [_readable(a, per) for a in (q.scales, q.zeros, q.offsets) if a is not None]

    def matrix(b: Index, j: Index, i: Index, which: jax.Ref) -> tuple[Index, Index, Index]:
        live = which[b] >= 0  # a skipped tile stays at one block, which is fetched once
        return jnp.maximum(which[b], 0), jnp.where(live, i, 0), jnp.where(live, j, 0)

    def table(b: Index, j: Index, i: Index, which: jax.Ref) -> tuple[Index, Index, Index]:
        e, i, j = matrix(b, j, i, which)
        return e, i if groups > 1 else 0, j

    scratch = [pltpu.VMEM((rows, block_n), jnp.float32)]
    if not sums:
        scratch.append(pltpu.VMEM((block_k, block_n), x.dtype))
    words = block_k * q.bits // 32
    program = pl.pallas_call(
        functools.partial(_kernel, spec=spec, per=per, steps=steps, sums=sums),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles, -(-n // block_n), steps),
            in_specs=[
                pl.BlockSpec((None, rows, block_k), lambda b, j, i, which: (b, 0, i)),
                pl.BlockSpec((None, words, block_n), matrix),
                *[pl.BlockSpec((None, per, block_n), table) for _ in tables],
            ],
            out_specs=pl.BlockSpec((None, rows, block_n), lambda b, j, i, which: (b, 0, j)),
            scratch_shapes=scratch,
        ),
        out_shape=_like((tiles, rows, n), wide, which, x, q),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * tiles * rows * k * n,
            transcendentals=0,
            bytes_accessed=x.nbytes + tiles * (q.nbytes // q.batch[0] + rows * n * wide.itemsize),
        ),
        interpret=interpret,
        name=f"awq_matmul_w{q.bits}",
    )
    return program(which, x, q.qweight, *tables).astype(out_dtype)


def _kernel(
    which: jax.Ref,
    x: jax.Ref,
    words: jax.Ref,
    scales: jax.Ref,
    *refs: jax.Ref,
    spec: WeightSpec,
    per: int,
    steps: int,
    sums: bool,
) -> None:
    """One block of one tile: ``acc += x @ w``, written out after the last block along K.

    With codes ``c = q - half`` every weight is ``c * s + o`` for an ``o`` per group and column.
    """
    shifts = refs[0] if spec.zeros or spec.offsets else None
    out, acc, *rest = refs if shifts is None else refs[1:]
    step, half = pl.program_id(2), 2.0 ** (spec.bits - 1)
    dtype, rows = x.dtype, min(spec.group_size, x.shape[1])
    exact = lax.Precision.HIGHEST if dtype == jnp.float32 else None

    @pl.when(step == 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)

    @pl.when(which[pl.program_id(0)] >= 0)
    def _() -> None:
        s, o = _float(scales[...]), None
        if shifts is not None:
            o = (half - _float(shifts[...])) * s if spec.zeros else half * s + _float(shifts[...])
        if spec.groups > 1 and spec.groups % per:
            left = spec.groups - step * per
            s, o = _inside(s, left), None if o is None else _inside(o, left)
        c = _signed(words[...], spec.bits)
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


def _inside(table: jax.Array, rows: Index) -> jax.Array:
    """The first ``rows`` rows; after the last group stands whatever memory holds, NaN too."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, table.shape, 0) < rows, table, 0.0)


def _signed(words: jax.Array, bits: int) -> jax.Array:
    """uint32 ``[R, N]`` to signed codes ``q - 2**(bits-1)`` as int4 or int8 ``[R * 32 / bits, N]``."""
    # In two's complement the difference is the code with its top bit flipped.
    flip, narrow = (0x88888888, jnp.int4) if bits == 4 else (0x80808080, jnp.int8)
    return pltpu.bitcast(words ^ jnp.uint32(flip), narrow)


def _readable(table: Array, per: int) -> Array:
    """A table ``[..., G, N]`` as the kernel reads it, ``per`` rows at a time.

    Float16, which Mosaic does not have, is read as its bits; bytes, of which it takes 32 rows or all, as bfloat16,
    which holds them exactly.
    """
    if table.dtype == jnp.uint8 and per % 32 and per < table.shape[-2]:
        return table.astype(jnp.bfloat16)
    return lax.bitcast_convert_type(table, jnp.uint16) if table.dtype == jnp.float16 else table


def _float(table: jax.Array) -> jax.Array:
    """A block of a table as float32."""
    if table.dtype == jnp.uint8:
        return table.astype(jnp.int32).astype(jnp.float32)
    if table.dtype != jnp.uint16:
        return table.astype(jnp.float32)
    # From the bits of float16 (bias 15): moved to float32's places (bias 127) they are 2**112 times too small.
    bits = table.astype(jnp.int32)
    exponent, mantissa = (bits >> 10) & 31, (bits & 1023).astype(jnp.float32)
    normal = lax.bitcast_convert_type((bits & 0x7FFF) << 13, jnp.float32) * 2.0**112
    size = jnp.where(exponent == 0, mantissa * 2.0**-24, normal)
    return jnp.where(bits >= 0x8000, -size, size)


def _like(shape: tuple[int, ...], dtype: DTypeLike, *operands: jax.Array | QuantizedTensor) -> jax.ShapeDtypeStruct:
    """The type of a result; under `jax.shard_map` it varies over the axes that any operand varies over."""
    first = lambda a: a.reshape(-1)[0].astype(dtype)  # noqa: E731
    return jax.eval_shape(lambda *a: jnp.zeros(shape, dtype) + sum(map(first, jax.tree.leaves(a))), *operands)
