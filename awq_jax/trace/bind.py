"""`bind`: an unmodified model, called with packed parameters."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from awq_jax import kernels
from awq_jax.kernels import grouped
from awq_jax.qtensor import QuantizedTensor, is_quantized
from awq_jax.trace import interpret
from awq_jax.trace.arguments import Form, split

T = TypeVar("T")  # what a model returns
Run = Callable[[Any, list[object]], T]  # of its parameters and the arrays among its arguments
KEPT = 32  # combinations of flags and argument structures remembered per bound function


def bind(apply_fn: Callable[..., T], *, impl: str = "auto") -> Callable[..., T]:
    """A function like ``apply_fn`` whose ``params`` may hold a `QuantizedTensor` in place of any leaf.

    The model needs no change: it is traced with the shapes of its float parameters, and every
    matmul with a packed leaf runs as a packed matmul. Where a packed leaf is read by something
    else (an embedding lookup, say) that leaf alone is dequantized, inside the compiled program.

    The result is compiled and may itself be used under jit, grad, vmap, scan and while loops, with
    donated arguments. Gradients with respect to the arguments need nothing special; for those with
    respect to the remaining float parameters see `awq_jax.trainable`. Calls with the same shapes
    are traced once.

    `jax.export` writes the XLA form of packed products: where the program is read, the kernels that this library
    compiles for CPUs are not there.

    Args:
      apply_fn: ``apply_fn(params, *args, **kwargs)``, pure: a plain function, ``model.apply`` of
        Linen, the function `awq_jax.nnx.functional` returns. Arrays among the arguments are traced;
        anything else (``train=False``, ``mutable=["cache"]``, Python numbers) is passed as it is,
        and another value means another trace: pass a counter that changes as an array.
      impl: kernel for packed weights, see `awq_jax.kernels.matmul`.

    Returns:
      A function with the signature of ``apply_fn``. Parameters without any packed leaf go straight
      to ``apply_fn``.

    Raises:
      BackendError: if ``impl`` is unknown, or at the call if it cannot run. A call also raises what
        ``apply_fn`` raises for arguments of these shapes.
    """
    kernels.check_impl(impl)
    compiled: OrderedDict[Form, Run[T]] = OrderedDict()

    @functools.wraps(apply_fn)
    def bound(params: object, *args: object, **kwargs: object) -> T:
        if not any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
            return apply_fn(params, *args, **kwargs)
        arrays, form = split(args, kwargs)
        try:
            run = compiled.pop(form, None)
        except TypeError:  # an unhashable argument: correct, but traced at every call
            return _compile(apply_fn, impl, form)(params, arrays)
        compiled[form] = run = run or _compile(apply_fn, impl, form)
        if len(compiled) > KEPT:
            compiled.popitem(last=False)
        return run(params, arrays)

    return bound


def _compile(apply_fn: Callable[..., T], impl: str, form: Form) -> Run[T]:
    """``run(params, arrays)`` for one structure of the arguments and one set of non-array values."""

    def matmul(x: jax.Array, q: QuantizedTensor, expert: jax.Array | None = None) -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        if expert is None:
            return kernels.matmul(x, q, impl=impl, preferred_element_type=wide)
        few = len(x) <= grouped.FEW_ROWS
        numbers = jnp.maximum(expert, 0) if few else expert
        y = grouped.matmul(x, q, numbers, impl=impl, preferred_element_type=wide, sparse=not few)
        return jnp.where(expert[:, None] >= 0, y, 0)

    def run(params: object, arrays: list[object]) -> T:
        args, kwargs = form.join(arrays)
        program = interpret.trace(apply_fn, params, *args, **kwargs)
        return interpret.run(program, params, *args, matmul=matmul, **kwargs)

    return jax.jit(run)
