"""Packed matmul on CPUs by compiled code: `kernels/native/`, called by XLA, built by `awq_jax.kernels.native_build`.

It reads the canonical words, so nothing is repacked and no float weight is ever in memory. Activations become integers
of 24 bits (16 where they are 16-bit floats) within blocks of at most 256 rows: at one row the time is that of reading
the words, whether there are 8, 16 or 24 bits, so there is no coarser mode. Results do not depend on the number of
threads. Here is what JAX needs around it: a rule for `jax.vmap` (rows are joined, or batches of weights), gradients
(through the dequantized weight), and the XLA form for many rows.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike

from awq_jax.kernels import native_build, xla
from awq_jax.kernels.backend import Backend, Request
from awq_jax.kernels.exported import unless_exported
from awq_jax.kernels.parallel import vary_as
from awq_jax.pack import Array
from awq_jax.qtensor import QuantizedTensor

BITS = (2, 3, 4, 8)
DTYPES = ("float32", "bfloat16", "float16")
# Beyond so many rows of a matrix XLA's dense product, for which tiles of the weight are dequantized, costs less, or
# (amx-int8) what the activations become takes more than a weight of floats.
MOST_ROWS = {"amx-int8": 2048, "avx512-vnni": 64, "avx-vnni": 32, "neon-dotprod": 32, "avx2": 16, "portable": 4}


def target(name: str = "") -> tuple[str, str] | str:
    """The level that is used (of that name, or the best) and its name in XLA; or why there is none."""
    return native_build.target(native_build.SYMBOL, name)


def obstacle(r: Request) -> str | None:
    """Why the kernel cannot serve a request, or None if it can."""
    if r.platform != "cpu":
        return f"it is for CPUs, and this runs on {r.platform}"
    q, dtypes = r.q, {jnp.dtype(a.dtype).name for a in (r.q.scales, r.q.offsets) if a is not None}
    if q.layout != "canonical":
        return f"the weight has the {q.layout} layout; repack it with awq_jax.kernels.prepare"
    if q.bits not in BITS:
        return f"codes have {q.bits} bits; it reads 2, 3, 4 and 8"
    if not {jnp.dtype(r.dtype).name, *dtypes} <= set(DTYPES):
        return f"activations are {jnp.dtype(r.dtype)} and scales {q.scales.dtype}; it takes {', '.join(DTYPES)}"
    found = target()
    return found if isinstance(found, str) else None


def describe(r: Request) -> str:
    """Which way a request would take, in words."""
    level = _level("")
    if r.m > MOST_ROWS[level]:
        return f"dequantize: {r.m} rows are more than {level} is used for; they are bound by arithmetic"
    return f"{level}: activations in {8 * _digits(r.dtype)} bits by block, codes read as they lie"


def matmul(
    x: jax.Array, q: QuantizedTensor, out_dtype: DTypeLike, level: str = "", most: int | None = None
) -> jax.Array:
    """``x @ q``, summed exactly by block and in float32 over blocks; ``inv_scale`` and ``perm`` are not applied here.

    Lowered for another platform than CPUs, it is `awq_jax.kernels.xla.dequantize`.

    Args:
      x: float ``[*B, m, K]``.
      q: weight ``[*B, K, N]`` without an `obstacle`.
      out_dtype: dtype of the result.
      level: the instructions to use; default: the best.
      most: rows beyond which XLA multiplies; default: by level.

    Returns:
      ``[*B, m, N]``.
    """
    most = MOST_ROWS[_level(level)] if most is None else most
    if x.shape[-2] > most or jnp.dtype(out_dtype).name not in DTYPES:
        return xla.matmul(x, q, out_dtype, "cpu")
    lead, (m, k) = x.shape[:-2], x.shape[-2:]
    many = math.prod(lead)
    spec = Spec(q.bits, q.group_size, jnp.dtype(out_dtype).name, level, most)
    flat = jax.tree.map(
        lambda a: a.reshape(many, *a.shape[len(lead) :]),
        dataclasses.replace(q, inv_scale=None, perm=None, axes="b" * len(lead) + "kn", k_dims=(k,), n_dims=(q.n,)),
    )
    y = _product(spec, x.reshape(many, m, k), dataclasses.replace(flat, axes="bkn"))
    return y.reshape(*lead, m, q.n)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a product before its arrays; see `matmul`."""

    bits: int
    group_size: int
    out_dtype: str
    level: str
    most: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: Spec, x: jax.Array, q: QuantizedTensor) -> jax.Array:
    return _vmappable(spec)(x, q)


def _backward(spec: Spec, saved: xla.Saved, dy: jax.Array) -> tuple[jax.Array, QuantizedTensor]:
    x, q = saved
    return xla.gradient(x, q, dy, "cpu"), xla.weight_gradient(x, q, dy, "cpu")


_product.defvjp(lambda spec, x, q: (_product(spec, x, q), (x, q)), _backward)


@functools.cache
def _vmappable(spec: Spec) -> Callable[[jax.Array, QuantizedTensor], jax.Array]:
    """``x [B, m, K] @ q [B, K, N]``. A vmap becomes more rows of the same weights, or more weights."""

    @custom_vmap
    def run(x: jax.Array, q: QuantizedTensor) -> jax.Array:
        dense = functools.partial(xla.dequantize, out_dtype=spec.out_dtype)
        return lax.platform_dependent(x, q, cpu=functools.partial(_call, spec), default=dense)

    @run.def_vmap
    def _(size: int, mapped: tuple[bool, QuantizedTensor], x: jax.Array, q: QuantizedTensor) -> tuple[jax.Array, bool]:
        x_mapped, q_mapped = mapped
        if not any(jax.tree.leaves(q_mapped)):
            b, m, k = x.shape[1:]
            rows = jnp.moveaxis(x, 0, 1).reshape(b, size * m, k)
            y = matmul(rows, q, spec.out_dtype, spec.level, spec.most)
            return jnp.moveaxis(y.reshape(b, size, m, -1), 1, 0), True

        def flat(a: jax.Array, has: bool) -> jax.Array:
            a = a if has else jnp.broadcast_to(a, (size, *a.shape))
            return a.reshape(-1, *a.shape[2:])

        y = _product(spec, flat(x, x_mapped), jax.tree.map(flat, q, q_mapped))
        return y.reshape(size, -1, *y.shape[1:]), True

    return run


def _call(spec: Spec, x: jax.Array, q: QuantizedTensor) -> jax.Array:
    found = target(spec.level)
    if isinstance(found, str):
        raise RuntimeError(found)  # `obstacle` says so first
    arrays, tree = jax.tree.flatten(q)

    def product(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        q: QuantizedTensor = jax.tree.unflatten(tree, arrays)
        more: list[Array] = [a for a in (q.zeros, q.offsets) if a is not None]
        call = jax.ffi.ffi_call(found[1], jax.ShapeDtypeStruct((*x.shape[:2], q.n), jnp.dtype(spec.out_dtype)))
        return call(
            x, q.qweight, q.scales, *more,
            bits=np.int32(spec.bits), digits=np.int32(_digits(x.dtype)), group_size=np.int32(spec.group_size),
        )  # fmt: skip

    def dense(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        return xla.dequantize(x, jax.tree.unflatten(tree, arrays), out_dtype=spec.out_dtype)

    y = unless_exported(product, dense, x, *arrays)
    return vary_as(y, x, *jax.tree.leaves(q))


def _digits(dtype: DTypeLike) -> int:
    return 3 if jnp.dtype(dtype).itemsize > 2 else 2


def _level(name: str) -> str:
    found = target(name)
    return name if isinstance(found, str) else found[0]


BACKEND = Backend(
    name="native",
    obstacle=obstacle,
    describe=describe,
    run=lambda x, r, out_dtype: matmul(x, r.q, out_dtype),
    made_for="cpu",
)
