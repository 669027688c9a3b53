"""Which kernel multiplies by a packed weight, and why."""

import dataclasses
import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from awq_jax.errors import BackendError, ShapeError
from awq_jax.kernels import adapted, native, pallas_tpu, parallel, triton_matmul, xla
from awq_jax.kernels.backend import Backend, Request
from awq_jax.qtensor import QuantizedTensor

log = logging.getLogger(__name__)

# In order of preference; "auto" takes the first without an obstacle.
BACKENDS: tuple[Backend, ...] = (triton_matmul.BACKEND, pallas_tpu.BACKEND, native.BACKEND, xla.BACKEND)


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
    x: jax.Array,
    q: QuantizedTensor,
    *,
    impl: str = "auto",
    preferred_element_type: DTypeLike | None = None,
    bias: jax.Array | None = None,
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
    if isinstance(q, adapted.Adapted):
        own = functools.partial(matmul, impl=impl)
        return adapted.matmul(x, q, own, jnp.dtype(preferred_element_type or x.dtype), bias)
    if q.placement is not None:
        y = parallel.matmul(x, q, functools.partial(matmul, impl=impl), jnp.dtype(preferred_element_type or x.dtype))
        return y if bias is None else y + bias.astype(y.dtype)
    request = dataclasses.replace(request_for(x, q), bias=bias)
    out_dtype = jnp.dtype(preferred_element_type or x.dtype)
    rows = (*batch, *[1] * (x.ndim - len(batch) - 1), q.k)  # of a table [*B, K] beside ``x``
    if q.inv_scale is not None:
        x = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * q.inv_scale.reshape(rows)).astype(x.dtype)
    if q.perm is not None:
        x = jnp.take_along_axis(x, q.perm.reshape(rows), axis=-1) if batch else x[..., q.perm]
    backend = pick(request, impl)
    y = backend.run(x.reshape(*batch, request.m, q.k), request, out_dtype)
    if bias is not None and not backend.fuses_bias:
        y = y + bias.astype(y.dtype)
    return y.reshape(*x.shape[:-1], q.n)


def explain(
    x: jax.Array | jax.ShapeDtypeStruct, w: jax.Array | jax.ShapeDtypeStruct | QuantizedTensor, *, impl: str = "auto"
) -> str:
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
    request = request_for(x, w)
    backend = pick(request, impl)
    passed = [f"not {b.name}: {b.obstacle(request)}" for b in BACKENDS[: BACKENDS.index(backend)] if impl == "auto"]
    return "; ".join([f"{backend.name} {backend.describe(request)}", *passed])


def request_for(x: jax.Array | jax.ShapeDtypeStruct, q: QuantizedTensor) -> Request:
    """The request that `matmul` makes of ``x [*B, ..., K]`` and ``q``."""
    m = math.prod(x.shape[len(q.batch) :]) // max(q.k, 1)
    return Request(m, q, x.dtype, platform_of(x))


def platform_of(x: jax.Array | jax.ShapeDtypeStruct) -> str:
    """Where a concrete array lives; for a traced or abstract one, where jit would put it."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        platform = next(iter(x.devices())).platform
    else:
        config: Any = jax.config
        device = config.jax_default_device or jax.default_backend()
        platform = device if isinstance(device, str) else device.platform
    return "cuda" if platform == "gpu" else platform


def pick(request: Request, impl: str) -> Backend:
    """The backend that serves a request.

    Raises:
      BackendError: if ``impl``, the name of one, cannot.
    """
    if impl == "auto":
        backend = next(b for b in BACKENDS if b.obstacle(request) is None)
        own = next((b for b in BACKENDS if b.made_for == request.platform), backend)
        if backend is not own:
            _warn_once(f"a packed weight is multiplied by {backend.name}, not by {own.name}: {own.obstacle(request)}")
        return backend
    backend = next(b for b in BACKENDS if b.name == impl)
    reason = backend.obstacle(request)
    if reason is not None:
        raise BackendError(f"impl={impl!r} cannot run here: {reason}; use impl='auto'")
    return backend


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
