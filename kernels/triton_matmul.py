"""Packed matmul on NVIDIA GPUs through jax-triton, for weights in the ``"cuda"`` layout.

The kernels are in `awq_jax.kernels.triton_kernels`; here is what JAX needs around them: shapes and
grids, a rule for `jax.vmap` (rows are joined, batches of weights become a grid axis), a gradient
(through the dequantized weight), and the sum over the parts of K.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike

from awq_jax.kernels import layout, tuned, xla
from awq_jax.kernels.backend import Backend, Request
from awq_jax.kernels.parallel import sum_as, vary_as
from awq_jax.pack import PLANE, planes
from awq_jax.qtensor import QuantizedTensor

OLDEST = 80  # compute capability times ten: asynchronous copies, bfloat16 in tensor cores
DTYPES = ("bfloat16", "float16")
DENSE_COLUMNS, DENSE_RUNS = 64, 4  # of a program that dequantizes: 64 KiB written


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a product before its arrays.

    Attributes:
      bits, group_size: of the weight.
      out_dtype: name of the result's dtype.
      chip: what it runs on.
      config: tile sizes, or None to look them up.
      tables: what they are looked up in, see `tuned.given`; JAX keeps traces by this.
    """

    bits: int
    group_size: int
    out_dtype: str
    chip: tuned.Chip
    config: tuned.Config | None = None
    tables: str = ""


@functools.cache
def unavailable() -> str | None:
    """Why jax-triton cannot be used in this process, or None."""
    try:
        _modules()
    except Exception as e:  # besides ImportError: versions of jax and jax-triton that do not fit each other
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        return f"jax-triton cannot be imported ({reason}); install awq-jax[cuda]"
    return None


def obstacle(r: Request) -> str | None:
    """Why the kernels cannot serve a request, or None if they can."""
    if r.platform != "cuda":
        return f"its kernels are for CUDA, and this runs on {r.platform}"
    chip = tuned.local_chip()
    if chip is None:
        return "this process has no NVIDIA GPU"
    if chip.sm < OLDEST:
        return f"{chip.kind} has compute capability {chip.sm / 10}; its kernels need {OLDEST / 10}"
    dtype = jnp.dtype(r.dtype).name
    if dtype not in DTYPES:
        return f"activations are {dtype}; its kernels take {' or '.join(DTYPES)}"
    if r.q.layout != "cuda":
        reason = layout.obstacle(r.q)
        return reason or "the weight has the canonical layout; repack it once with awq_jax.kernels.prepare"
    if r.m == 0:
        return "there are no activation rows"
    return unavailable()


def describe(r: Request) -> str:
    """Which kernel a request would take, in words."""
    m, q, chip = r.m, r.q, tuned.local_chip()
    assert chip is not None
    c = tuned.choose(chip, q.bits, m, q.k, q.n)
    if c.kernel == "dequantize":
        return f"dequantize: {m} rows are bound by arithmetic, not by reading the weight"
    parts = c.splits(chip, math.prod(q.batch), m, q.k, q.n, q.bits)
    rows = 1 if c.kernel == "gemv" else c.block_m
    return f"{c.kernel}: tiles of {rows} rows x {c.block_n} columns, K in {parts} part{'s'[: parts > 1]}"


def matmul(
    x: jax.Array,
    q: QuantizedTensor,
    out_dtype: DTypeLike,
    *,
    chip: tuned.Chip,
    config: tuned.Config | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """``x @ q + bias``, accumulated in float32; ``inv_scale`` and ``perm`` are not applied here.

    Lowered for another platform than CUDA, it is `awq_jax.kernels.xla.dequantize`.

    Args:
      x: bfloat16 or float16 ``[*B, m, K]``.
      q: weight ``[*B, K, N]`` in the ``"cuda"`` layout.
      out_dtype: dtype of the result.
      chip: the device to compile for.
      config: tile sizes; default: from the tables.
      bias: float ``[N]``, or None.

    Returns:
      ``[*B, m, N]``.
    """
    *lead, m, k = x.shape
    n = q.n
    tables = tuned.given(chip) if config is None else ""
    spec = Spec(q.bits, q.group_size, jnp.dtype(out_dtype).name, chip, config, tables)
    # An offset that is no multiple of the scale: the codes are multiplied as if symmetric, and what
    # is missing, (h s + o) per group and column, meets the sums of x over the groups.
    own = spec if q.offsets is None else dataclasses.replace(spec, out_dtype="float32")
    flat = [None if a is None else a.reshape(-1, *a.shape[-2:]) for a in (x, q.qweight, q.scales, q.zeros)]
    y = _product(own, *flat, bias).reshape(*lead, m, n)
    if q.offsets is not None:
        groups = q.scales.shape[-2]
        rows = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * q.group_size - k)])
        sums = rows.reshape(*lead, m, groups, q.group_size).sum(-1, dtype=jnp.float32)
        missing = 2.0 ** (q.bits - 1) * q.scales.astype(jnp.float32) + q.offsets.astype(jnp.float32)
        y = y + jnp.matmul(sums, missing, precision=lax.Precision.HIGHEST)
    return y.astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec, x, qweight, scales, zeros, bias):
    """``x [B, m, K]`` times ``qweight [B, N, W]``, plus ``bias [N]`` or None, as ``[B, m, N]``."""
    return _vmappable(spec)(x, qweight, scales, zeros, bias)


def _forward(spec, *arrays):
    return _product(spec, *arrays), arrays


def _backward(spec, arrays, dy):
    x, qweight, scales, zeros, bias = arrays
    q = _tensor(spec, x, qweight, scales, zeros)
    dx, ds = xla.gradient(x, q, dy, "cuda"), xla.weight_gradient(x, q, dy, "cuda").scales
    db = None if bias is None else sum_as(dy.sum((0, 1), dtype=jnp.float32).astype(bias.dtype), bias)
    return dx, None, ds, None, db


_product.defvjp(_forward, _backward)


@functools.cache
def _vmappable(spec: Spec):
    @custom_vmap
    def product(x, qweight, scales, zeros, bias):
        choice = spec.config or tuned.choose(spec.chip, spec.bits, x.shape[1], x.shape[2], qweight.shape[1])
        launch = _launch_dense if choice.kernel == "dequantize" else _launch
        return lax.platform_dependent(
            x,
            qweight,
            scales,
            zeros,
            bias,
            cuda=functools.partial(launch, spec, choice),
            default=functools.partial(_dense, spec),
        )

    @product.def_vmap
    def rule(size, batched, *arrays):
        x, *weight, bias = arrays
        batched_x, *batched_weight, batched_bias = batched
        if not any(batched_weight) and not batched_bias:  # more rows for the same weights
            _, b, m, k = x.shape
            y = _product(spec, jnp.moveaxis(x, 0, 1).reshape(b, size * m, k), *weight, bias)
            return jnp.moveaxis(y.reshape(b, size, m, -1), 1, 0), True

        def every(a, is_batched):
            if a is None:
                return None
            a = a if is_batched else jnp.broadcast_to(a, (size, *a.shape))
            return a.reshape(-1, *a.shape[2:])

        joined = [every(a, f) for a, f in zip((x, *weight), (batched_x, *batched_weight), strict=True)]
        each_bias = None if batched_bias else bias
        y = _product(spec, *joined, each_bias)
        y = y.reshape(size, -1, *y.shape[1:])
        return (y + bias[:, None, None].astype(y.dtype) if batched_bias else y), True

    return product


def _dense(spec, x, qweight, scales, zeros, bias):
    y = xla.dequantize(x, _tensor(spec, x, qweight, scales, zeros), spec.out_dtype)
    return y if bias is None else y + bias.astype(y.dtype)


def _tensor(spec, x, qweight, scales, zeros) -> QuantizedTensor:
    return QuantizedTensor(
        qweight, scales, zeros, None, spec.bits, spec.group_size, "bkn", (x.shape[-1],), (qweight.shape[-2],),
        x.dtype.name, layout="cuda",
    )  # fmt: skip


def _launch(spec: Spec, choice: tuned.Config, x, qweight, scales, zeros, bias) -> jax.Array:
    b, m, k = x.shape
    n = qweight.shape[1]
    split = choice.splits(spec.chip, b, m, k, n, spec.bits)
    constants = {"BIAS": bias is not None and split == 1, "SPLIT": split, "BN": choice.block_n}
    rows = 1
    if choice.kernel == "mma":
        rows = choice.block_m
        constants |= {"BM": rows, "LATE": choice.late}
    out_dtype = jnp.dtype(spec.out_dtype)
    y = _call(
        spec,
        choice,
        (x, *_weight(qweight, scales, zeros), x if bias is None else bias, m),
        (-(-m // rows), -(-n // choice.block_n), b * split),
        jax.ShapeDtypeStruct((b * split, m, n), out_dtype if split == 1 else jnp.float32),
        _constants(spec, k, qweight, scales, zeros) | constants,
    )
    if split > 1:
        y = y.reshape(b, split, m, n).sum(1)
        y = y if bias is None else y + bias.astype(jnp.float32)
    return y.astype(out_dtype)


def _launch_dense(spec: Spec, choice: tuned.Config, x, qweight, scales, zeros, bias) -> jax.Array:
    """Write the weight out, transposed as its codes lie, and let XLA multiply."""
    # Otherwise the weights, which depend on nothing, may all be dequantized at the start of the program.
    x, qweight = lax.optimization_barrier((x, qweight))
    (b, _, k), n = x.shape, qweight.shape[1]
    runs = -(-k // (PLANE * planes(spec.bits)))
    w = _call(
        spec,
        choice,
        _weight(qweight, scales, zeros),
        (-(-n // DENSE_COLUMNS), -(-runs // DENSE_RUNS), b),
        jax.ShapeDtypeStruct((b, n, k), x.dtype),
        _constants(spec, k, qweight, scales, zeros) | {"PER": DENSE_RUNS, "BN": DENSE_COLUMNS},
    )
    # Tensor cores sum in float32 whatever they return.
    exact = bias is not None or jnp.dtype(spec.out_dtype) != x.dtype
    y = lax.dot_general(
        x, w, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32 if exact else spec.out_dtype
    )
    return (y if bias is None else y + bias.astype(y.dtype)).astype(spec.out_dtype)


def _weight(qweight, scales, zeros) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pointers of a weight; one that is not there is any other."""
    scales = scales.astype(jnp.float32) if scales.dtype.itemsize > 4 else scales
    return qweight, scales, qweight if zeros is None else zeros


def _constants(spec: Spec, k: int, qweight, scales, zeros) -> dict[str, Any]:
    return {
        "N": qweight.shape[1],
        "K": k,
        "GROUPS": scales.shape[1],
        "GROUP_PLANES": spec.group_size // PLANE,
        "BITS": spec.bits,
        "ZEROS": zeros is not None,
        "ASM": True,
    }


def _call(spec: Spec, choice: tuned.Config, arguments, grid, result, constants) -> jax.Array:
    """Start the kernel ``choice.kernel``."""
    jt, kernels, out_keyword = _modules()
    y = jt.triton_call(
        *arguments,
        kernel=getattr(kernels, choice.kernel),
        grid=grid,
        num_warps=choice.warps,
        num_stages=choice.stages,
        compute_capability=spec.chip.sm,
        name=f"awq_{choice.kernel}",
        **{out_keyword: result},
        **constants,
    )
    return vary_as(y, *arguments)


@functools.cache
def _modules() -> tuple[Any, Any, str]:
    """jax-triton, the kernels, and what this jax-triton calls the description of the result."""
    cache = os.environ.get("TRITON_CACHE_DIR")
    jt = importlib.import_module("jax_triton")
    if cache is None:  # importing jax-triton empties it for the whole process
        os.environ.pop("TRITON_CACHE_DIR", None)
    else:
        os.environ["TRITON_CACHE_DIR"] = cache
    kernels = importlib.import_module("awq_jax.kernels.triton_kernels")
    version = tuple(int(v) for v in jt.__version__.split(".")[:2])
    return jt, kernels, "out_type" if version >= (0, 4) else "out_shape"


def _run(x: jax.Array, r: Request, out_dtype: DTypeLike) -> jax.Array:
    chip = tuned.local_chip()
    assert chip is not None
    return matmul(x, r.q, out_dtype, chip=chip, bias=r.bias)


BACKEND = Backend("triton", obstacle, describe, _run, fuses_bias=True, made_for="cuda", layout="cuda")
