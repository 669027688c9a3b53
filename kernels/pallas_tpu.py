"""Packed matmul on TPU (Pallas): dequantizes tiles of the canonical words in VMEM, next to the matrix unit.

The kernel is in `awq_jax.kernels.pallas_kernels`; here is what JAX needs around it: tile sizes, a rule for `jax.vmap`
(rows are joined, or batches of weights), and gradients (through the dequantized weight).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike

from awq_jax.kernels import xla
from awq_jax.kernels.backend import Backend, Request
from awq_jax.qtensor import QuantizedTensor

if TYPE_CHECKING:
    from jax.experimental.pallas import tpu as pltpu

Interpret: TypeAlias = "bool | pltpu.InterpretParams"

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


def obstacle(r: Request) -> str | None:
    """Why the kernel cannot serve a request, or None if it can."""
    if r.platform != "tpu":
        return f"it is a TPU kernel, and this runs on {r.platform}"
    q, dtype = r.q, jnp.dtype(r.dtype)
    if q.layout != "canonical":
        return f"the weight has the {q.layout} layout; repack it with awq_jax.kernels.prepare"
    if q.bits not in (4, 8):
        return f"{q.bits}-bit codes do not fill TPU registers; 4 and 8 bits do"
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"no TPU multiplies {dtype}"
    groups, g = q.scales.shape[-2], q.group_size
    if groups > 1 and (g & (g - 1) or not 16 <= g <= 256):
        return f"groups of {g} rows do not divide a tile; 16, 32, 64, 128, 256 and the whole column do"
    if q.n < LANES:
        return f"{q.n} columns do not fill a register of {LANES}"
    if groups * g < BLOCK_K and groups * g % 64:
        return f"{groups * g} rows are less than a tile and no multiple of 64"
    return None


def tile(rows: int, q: QuantizedTensor, dtype: DTypeLike) -> Tile:
    """Blocks for ``rows`` activation rows of ``dtype`` per matrix."""
    groups, g = q.scales.shape[-2], q.group_size
    most = MOST_ROWS if jnp.dtype(dtype) == jnp.bfloat16 else MOST_ROWS // 2
    high = min(most, max(FEWEST_ROWS, 1 << (rows - 1).bit_length()))
    few = high <= SUMS_ROWS
    wide = BLOCK_N if few else PREFILL_N
    # A block has at least 8 rows of scales; sums of a group are products of their own, so it must fill the matrix unit.
    deep = BLOCK_K if groups == 1 else max(BLOCK_K, 8 * g)
    return Tile(high, min(deep, groups * g), min(wide, q.n // LANES * LANES), few and g >= LANES)


def describe(r: Request) -> str:
    """One line on how a request would be multiplied."""
    t = tile(r.m, r.q, r.dtype)
    how = "scales applied to sums" if t.sums else "dequantized in VMEM"
    return f"tiles of {t.rows} x {t.k} x {t.n}, {how}"


def matmul(x: jax.Array, q: QuantizedTensor, out_dtype: DTypeLike, interpret: Interpret = False) -> jax.Array:
    """``x @ q``, accumulated in float32, differentiable; ``inv_scale`` and ``perm`` are not applied here.

    Args:
      x: float ``[*B, m, K]``.
      q: weight ``[*B, K, N]`` without an `obstacle`.
      out_dtype: dtype of the result.
      interpret: True or `pltpu.InterpretParams` to run without a TPU.

    Returns:
      ``[*B, m, N]``.
    """
    lead, (m, k) = x.shape[:-2], x.shape[-2:]
    if 0 in (*lead, m):
        return jnp.zeros((*lead, m, q.n), out_dtype)
    many = math.prod(lead)
    q = jax.tree.map(lambda a: a.reshape(many, *a.shape[len(lead) :]), _bare(q))
    return _batched(jnp.dtype(out_dtype), interpret, x.reshape(many, m, k), q).reshape(*lead, m, q.n)


def experts(
    x: jax.Array, q: QuantizedTensor, expert: jax.Array, out_dtype: DTypeLike, interpret: Interpret = False
) -> jax.Array:
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
def _batched(out_dtype: DTypeLike, interpret: Interpret, x: jax.Array, q: QuantizedTensor) -> jax.Array:
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
    def _(size: int, mapped: tuple[bool, QuantizedTensor], x: jax.Array, q: QuantizedTensor) -> tuple[jax.Array, bool]:
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


def _batched_backward(
    out_dtype: DTypeLike, interpret: Interpret, saved: xla.Saved, dy: jax.Array
) -> tuple[jax.Array, QuantizedTensor]:
    # Many rows and no decode: XLA's dense product of the dequantized weight is as good.
    x, q = saved
    return xla.gradient(x, q, dy, "tpu"), xla.weight_gradient(x, q, dy, "tpu")


_batched.defvjp(lambda *args: (_batched(*args), args[2:]), _batched_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts(
    out_dtype: DTypeLike, interpret: Interpret, x: jax.Array, q: QuantizedTensor, expert: jax.Array
) -> jax.Array:
    t = dataclasses.replace(tile(x.shape[1], q, x.dtype), rows=x.shape[1])
    return _call(x, q, expert, t, out_dtype, interpret)


def _experts_backward(
    out_dtype: DTypeLike,
    interpret: Interpret,
    saved: tuple[jax.Array, QuantizedTensor, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, QuantizedTensor, None]:
    x, q, expert = saved

    def forward(x: jax.Array, q: QuantizedTensor) -> jax.Array:
        def one(_: None, tile: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
            x, e = tile
            return None, xla.dequantize(x, jax.tree.map(lambda a: a[jnp.maximum(e, 0)], q), out_dtype)

        y = lax.scan(one, None, (x, expert))[1]
        return jnp.where(expert[:, None, None] < 0, 0, y)

    return (*jax.vjp(forward, x, q)[1](dy), None)


_experts.defvjp(lambda *args: (_experts(*args), args[2:]), _experts_backward)


def _call(
    x: jax.Array, q: QuantizedTensor, which: jax.Array, t: Tile, out_dtype: DTypeLike, interpret: Interpret
) -> jax.Array:
    from awq_jax.kernels import pallas_kernels  # for cost: only TPUs need it

    return pallas_kernels.call(x, q, which, (t.k, t.n), t.sums, out_dtype, interpret)


BACKEND = Backend(
    name="pallas",
    obstacle=obstacle,
    describe=describe,
    run=lambda x, r, out_dtype: matmul(x, r.q, out_dtype),
    made_for="tpu",
    experts=lambda x, r, expert, out_dtype: experts(x, r.q, expert, out_dtype),
)
