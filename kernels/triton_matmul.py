"""Packed matmul on NVIDIA GPUs through jax-triton, for weights in the ``"cuda"`` layout.

The kernels are in `awq_jax.kernels.triton_kernels`; here is what JAX needs around them: shapes and
grids, a rule for `jax.vmap` (rows are joined, batches of weights become a grid axis), a gradient
(through the dequantized weight), and the sum over the parts of K.
"""

import dataclasses
import functools
import importlib
import math
import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike

from awq_jax.kernels import layout, tuned, xla
from awq_jax.kernels.backend import Backend, Request
from awq_jax.kernels.parallel import sum_as, vary_as
from awq_jax.pack import PLANE, Array, planes
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
    arrays = jax.tree.map(lambda a: a.reshape(-1, *a.shape[-2:]), _Operands(x, q.qweight, q.scales, q.zeros, None))
    y = _product(own, arrays._replace(bias=bias)).reshape(*lead, m, n)
    if q.offsets is not None:
        groups = q.scales.shape[-2]
        rows = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * q.group_size - k)])
        sums = rows.reshape(*lead, m, groups, q.group_size).sum(-1, dtype=jnp.float32)
        missing = 2.0 ** (q.bits - 1) * q.scales.astype(jnp.float32) + q.offsets.astype(jnp.float32)
        y = y + jnp.matmul(sums, missing, precision=lax.Precision.HIGHEST)
    return y.astype(out_dtype)


class _Operands(NamedTuple):
    """``x [B, m, K]``, the arrays of a weight in the CUDA layout with one batch axis B, and ``bias [N]`` or None."""

    x: jax.Array
    qweight: Array
    scales: Array
    zeros: Array | None
    bias: jax.Array | None

    def weight(self, spec: Spec) -> QuantizedTensor:
        k, n = self.x.shape[-1], self.qweight.shape[-2]
        return QuantizedTensor(
            self.qweight, self.scales, self.zeros, None, spec.bits, spec.group_size, "bkn", (k,), (n,),
            self.x.dtype.name, layout="cuda",
        )  # fmt: skip

    def pointers(self) -> tuple[Array, Array, Array]:
        """Of the weight, as the kernels take it; an array that is not there is any other."""
        scales = self.scales.astype(jnp.float32) if self.scales.dtype.itemsize > 4 else self.scales
        return self.qweight, scales, self.qweight if self.zeros is None else self.zeros

    def constants(self, spec: Spec) -> dict[str, int]:
        """What the kernels are compiled for."""
        return {
            "N": self.qweight.shape[1],
            "K": self.x.shape[2],
            "GROUPS": self.scales.shape[1],
            "GROUP_PLANES": spec.group_size // PLANE,
            "BITS": spec.bits,
            "ZEROS": self.zeros is not None,
            "ASM": True,
        }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: Spec, a: _Operands) -> jax.Array:
    """``x`` times the weight, plus the bias, as ``[B, m, N]``."""
    return _vmappable(spec)(a)


def _backward(spec: Spec, a: _Operands, dy: jax.Array) -> tuple[_Operands]:
    q = a.weight(spec)
    dx, dq = xla.gradient(a.x, q, dy, "cuda"), xla.weight_gradient(a.x, q, dy, "cuda")
    db = None if a.bias is None else sum_as(dy.sum((0, 1), dtype=jnp.float32).astype(a.bias.dtype), a.bias)
    return (_Operands(dx, dq.qweight, dq.scales, dq.zeros, db),)


_product.defvjp(lambda spec, a: (_product(spec, a), a), _backward)


@functools.cache
def _vmappable(spec: Spec) -> Callable[[_Operands], jax.Array]:
    @custom_vmap
    def product(a: _Operands) -> jax.Array:
        _, m, k = a.x.shape
        choice = spec.config or tuned.choose(spec.chip, spec.bits, m, k, a.qweight.shape[1])
        launch = _launch_dense if choice.kernel == "dequantize" else _launch
        return lax.platform_dependent(
            a, cuda=functools.partial(launch, spec, choice), default=functools.partial(_dense, spec)
        )

    @product.def_vmap
    def rule(size: int, batched: tuple[_Operands], a: _Operands) -> tuple[jax.Array, bool]:
        (has,) = batched
        if not any(has[1:]):  # more rows for the same weights
            _, b, m, k = a.x.shape
            y = _product(spec, a._replace(x=jnp.moveaxis(a.x, 0, 1).reshape(b, size * m, k)))
            return jnp.moveaxis(y.reshape(b, size, m, -1), 1, 0), True

        def joined(array: jax.Array, is_batched: bool) -> jax.Array:
            array = array if is_batched else jnp.broadcast_to(array, (size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        each_bias = None if has.bias else a.bias
        arrays = jax.tree.map(joined, a._replace(bias=None), has._replace(bias=None))
        y = _product(spec, arrays._replace(bias=each_bias))
        y = y.reshape(size, -1, *y.shape[1:])
        return (y + a.bias[:, None, None].astype(y.dtype) if a.bias is not None and has.bias else y), True

    return product


def _dense(spec: Spec, a: _Operands) -> jax.Array:
    y = xla.dequantize(a.x, a.weight(spec), spec.out_dtype)
    return y if a.bias is None else y + a.bias.astype(y.dtype)


def _launch(spec: Spec, choice: tuned.Config, a: _Operands) -> jax.Array:
    (b, m, k), n, bias = a.x.shape, a.qweight.shape[1], a.bias
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
        (a.x, *a.pointers(), a.x if bias is None else bias, m),
        (-(-m // rows), -(-n // choice.block_n), b * split),
        jax.ShapeDtypeStruct((b * split, m, n), out_dtype if split == 1 else jnp.float32),
        a.constants(spec) | constants,
    )
    if split > 1:
        y = y.reshape(b, split, m, n).sum(1)
        y = y if bias is None else y + bias.astype(jnp.float32)
    return y.astype(out_dtype)


def _launch_dense(spec: Spec, choice: tuned.Config, a: _Operands) -> jax.Array:
    """Write the weight out, transposed as its codes lie, and let XLA multiply."""
    # Otherwise the weights, which depend on nothing, may all be dequantized at the start of the program.
    x, qweight = lax.optimization_barrier((a.x, a.qweight))
    a = a._replace(x=x, qweight=qweight)
    (b, _, k), n, bias = x.shape, qweight.shape[1], a.bias
    runs = -(-k // (PLANE * planes(spec.bits)))
    w = _call(
        spec,
        choice,
        a.pointers(),
        (-(-n // DENSE_COLUMNS), -(-runs // DENSE_RUNS), b),
        jax.ShapeDtypeStruct((b, n, k), x.dtype),
        a.constants(spec) | {"PER": DENSE_RUNS, "BN": DENSE_COLUMNS},
    )
    # Tensor cores sum in float32 whatever they return.
    exact = bias is not None or jnp.dtype(spec.out_dtype) != x.dtype
    y = lax.dot_general(
        x, w, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32 if exact else spec.out_dtype
    )
    return (y if bias is None else y + bias.astype(y.dtype)).astype(spec.out_dtype)


def _call(
    spec: Spec,
    choice: tuned.Config,
    arguments: tuple[Array | int, ...],
    grid: tuple[int, ...],
    result: jax.ShapeDtypeStruct,
    constants: dict[str, int],
) -> jax.Array:
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
def _modules() -> tuple[ModuleType, ModuleType, str]:
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
