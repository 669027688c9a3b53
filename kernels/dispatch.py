"""Which kernel multiplies by a packed weight, and why."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from awq_jax.errors import BackendError, ShapeError
from awq_jax.kernels import parallel, triton_matmul, tuned, xla
from awq_jax.qtensor import QuantizedTensor

log = logging.getLogger(__name__)

OLDEST = 80  # compute capability times ten, of the Triton kernels: asynchronous copies, bfloat16 in tensor cores


@dataclasses.dataclass(frozen=True)
class Request:
    """What a backend needs to know to say whether and how it would run.

    Attributes:
      m: activation rows (per batch element).
      q: the weight (arrays, tracers or abstract).
      dtype: dtype of the activation.
      platform: where it will run: ``"cpu"``, ``"cuda"``, ``"tpu"``, ...
      bias: float ``[N]`` to be added by a backend that fuses it, or None.
    """

    m: int
    q: QuantizedTensor
    dtype: Any
    platform: str
    bias: Any = None


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of the packed matmul.

    Attributes:
      name: what ``impl=`` calls it.
      obstacle: why it cannot serve a request, or None if it can.
      describe: which form it would use for a request, and why.
      run: ``(x [*B, m, K], request, out_dtype) -> [*B, m, N]``, without ``inv_scale`` and ``perm``.
      fuses_bias: ``run`` adds ``request.bias``.
    """

    name: str
    obstacle: Callable[[Request], str | None]
    describe: Callable[[Request], str]
    run: Callable[[jax.Array, Request, Any], jax.Array]
    fuses_bias: bool = False


def _triton_obstacle(r: Request) -> str | None:
    if r.platform != "cuda":
        return f"its kernels are for CUDA, and this runs on {r.platform}"
    chip = tuned.local_chip()
    if chip is None:
        return "this process has no NVIDIA GPU"
    if chip.sm < OLDEST:
        return f"{chip.kind} has compute capability {chip.sm / 10}; its kernels need {OLDEST / 10}"
    return triton_matmul.obstacle(r.m, r.q, r.dtype)


def _triton_describe(r: Request) -> str:
    chip = tuned.local_chip()
    assert chip is not None
    return triton_matmul.describe(r.m, r.q, chip)


def _triton_run(x: jax.Array, r: Request, out_dtype: Any) -> jax.Array:
    chip = tuned.local_chip()
    assert chip is not None
    return triton_matmul.matmul(x, r.q, out_dtype, chip=chip, bias=r.bias)


def _pallas_obstacle(r: Request) -> str | None:
    if r.platform != "tpu":
        return f"it is a TPU kernel, and this runs on {r.platform}"
    if r.q.layout != "canonical":
        return f"the weight has the {r.q.layout} layout; repack it with awq_jax.kernels.prepare"
    from awq_jax.kernels import pallas_tpu  # takes more than a second to import, and only TPUs need it

    return pallas_tpu.obstacle(r.q, r.dtype)


def _pallas_describe(r: Request) -> str:
    from awq_jax.kernels import pallas_tpu

    return pallas_tpu.describe(r.m, r.q, r.dtype)


def _pallas_run(x: jax.Array, r: Request, out_dtype: Any) -> jax.Array:
    from awq_jax.kernels import pallas_tpu

    return pallas_tpu.matmul(x, r.q, out_dtype)


# In order of preference; "auto" takes the first without an obstacle.
BACKENDS: tuple[Backend, ...] = (
    Backend("triton", _triton_obstacle, _triton_describe, _triton_run, fuses_bias=True),
    Backend(name="pallas", obstacle=_pallas_obstacle, describe=_pallas_describe, run=_pallas_run),
    Backend(
        name="xla",
        obstacle=lambda r: None,
        describe=lambda r: "{}: {}".format(*xla.form(r.m, r.platform)),
        run=lambda x, r, out_dtype: xla.matmul(x, r.q, out_dtype, r.platform),
    ),
)


# Where the kernel that is made for a platform does not run, its user should know.
NATIVE = {"cuda": "triton", "tpu": "pallas"}


def check_impl(impl: str) -> str:
    """``impl`` itself if it names a backend or ``"auto"``.

    Raises:
      BackendError: otherwise.
    """
    names = ("auto", *(b.name for b in BACKENDS))
    if impl not in names:
        raise BackendError(f"no kernel implementation {impl!r} in this release; choose one of {', '.join(names)}")
    return impl


def matmul(
    x: jax.Array, q: QuantizedTensor, *, impl: str = "auto", preferred_element_type: Any = None, bias: Any = None
) -> jax.Array:
    """Multiply activations by a packed weight, accumulating in float32.

    Args:
      x: float ``[*B, ..., K]`` where ``*B`` are the batch axes of ``q`` (none, or e.g. experts).
      q: packed weight, canonically ``[*B, K, N]``.
      impl: ``"auto"``, or the name of the backend that must run.
      preferred_element_type: dtype of the result (default: ``x.dtype``).
      bias: float ``[N]`` to add, or None.

    Returns:
      ``[*B, ..., N]``.

    Raises:
      BackendError: if ``impl`` is unknown or cannot run this.
      ShapeError: if the shapes do not fit, or ``x`` is not floating point.
    """
    check_impl(impl)
    batch = q.batch
    if bias is not None and tuple(bias.shape) != (q.n,):
        raise ShapeError(f"bias of shape {tuple(bias.shape)} for a packed weight with {q.n} outputs: expected [{q.n}]")
    if x.ndim <= len(batch) or tuple(x.shape[: len(batch)]) != batch or x.shape[-1] != q.k:
        want = ", ".join([*map(str, batch), "...", str(q.k)])
        raise ShapeError(
            f"activation of shape {x.shape} does not fit a packed weight of shape {q.shape} (axes "
            f"{q.live_axes!r}): expected [{want}]"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ShapeError(f"activation has dtype {x.dtype}; cast it to a floating point dtype first")
    if q.placement is not None:
        each = functools.partial(_on_one_device, impl=impl)
        y = parallel.matmul(x, q, each, jnp.dtype(preferred_element_type or x.dtype))
        return y if bias is None else y + bias.astype(y.dtype)
    request = dataclasses.replace(_request(x, q), bias=bias)
    out_dtype = jnp.dtype(preferred_element_type or x.dtype)
    if q.inv_scale is not None:
        inv = q.inv_scale.reshape(*batch, *[1] * (x.ndim - len(batch) - 1), q.k)
        x = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * inv).astype(x.dtype)
    if q.perm is not None:
        perm = q.perm.reshape(*batch, *[1] * (x.ndim - len(batch) - 1), q.k)
        x = jnp.take_along_axis(x, perm, axis=-1) if batch else x[..., q.perm]
    backend = _pick(request, impl)
    y = backend.run(x.reshape(*batch, request.m, q.k), request, out_dtype)
    if bias is not None and not backend.fuses_bias:
        y = y + bias.astype(y.dtype)
    return y.reshape(*x.shape[:-1], q.n)


def _on_one_device(x: jax.Array, q: QuantizedTensor, dtype: Any, impl: str) -> jax.Array:
    return matmul(x, q, impl=impl, preferred_element_type=dtype)


def explain(x: Any, w: Any, *, impl: str = "auto") -> str:
    """One line on what `awq_jax.dot` would run for these operands, and why.

    Args:
      x: activation ``[..., K]`` (array or ShapeDtypeStruct).
      w: float array or `QuantizedTensor`.
      impl: as in `matmul`.

    Raises:
      BackendError: if ``impl`` is unknown or cannot run this.
    """
    check_impl(impl)
    if not isinstance(w, QuantizedTensor):
        return f"dense: the weight is a float array ({w.dtype})"
    request = _request(x, w)
    backend = _pick(request, impl)
    passed = [f"not {b.name}: {b.obstacle(request)}" for b in BACKENDS[: BACKENDS.index(backend)] if impl == "auto"]
    return "; ".join([f"{backend.name} {backend.describe(request)}", *passed])


def _request(x: Any, q: QuantizedTensor) -> Request:
    m = math.prod(x.shape[len(q.batch) :]) // max(q.k, 1)
    return Request(m, q, x.dtype, _platform(x))


def _platform(x: Any) -> str:
    """Where a concrete array lives; for a traced one, where jit would put it."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return _canonical(next(iter(x.devices())).platform)
    config: Any = jax.config
    device = config.jax_default_device
    if device is None:
        return _canonical(jax.default_backend())
    return _canonical(device if isinstance(device, str) else device.platform)


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _canonical(platform: str) -> str:
    return "cuda" if platform == "gpu" else platform


def _pick(request: Request, impl: str) -> Backend:
    if impl == "auto":
        backend = next(b for b in BACKENDS if b.obstacle(request) is None)
        own = next((b for b in BACKENDS if b.name == NATIVE.get(request.platform)), backend)
        if backend is not own:
            _warn_once(f"a packed weight is multiplied by {backend.name}, not by {own.name}: {own.obstacle(request)}")
        return backend
    backend = next(b for b in BACKENDS if b.name == impl)
    reason = backend.obstacle(request)
    if reason is not None:
        raise BackendError(f"impl={impl!r} cannot run here: {reason}; use impl='auto'")
    return backend
