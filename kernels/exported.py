"""Compiled code of this library, where `jax.export` writes a program for machines that do not have it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

_CHOICE = Primitive("awq_jax_unless_exported")


def unless_exported(here: Callable[..., jax.Array], exported: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    """``here(*args)``; in a program that `jax.export` lowers, ``exported(*args)``, which must have the same result.

    Which it is shows only when a program is lowered, not when it is traced.
    """
    return _CHOICE.bind(*args, here=here, exported=exported)


def _result(*args: Any, here: Callable[..., jax.Array], exported: Callable[..., jax.Array]) -> Any:
    shaped = jax.eval_shape(here, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args))
    return jax.core.ShapedArray(shaped.shape, shaped.dtype)


def _lowered(ctx: Any, *args: Any, here: Callable[..., jax.Array], exported: Callable[..., jax.Array]) -> Any:
    chosen = exported if ctx.module_context.lowering_parameters.for_export else here
    return mlir.lower_fun(chosen, multiple_results=False)(ctx, *args)


_CHOICE.def_abstract_eval(_result)
_CHOICE.def_impl(lambda *args, **fns: jax.jit(functools.partial(_CHOICE.bind, **fns))(*args))
mlir.register_lowering(_CHOICE, _lowered)
