"""How much the result of each matmul with a parameter matters: the squares of the gradients that come back to it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from awq_jax.trace import interpret
from awq_jax.trace.jaxpr import Use

T = TypeVar("T")


class Place(NamedTuple):
    """A matmul's weight: `Use.path` and `Use.part`, which a `awq_jax.plan.plan.Site` has as well."""

    path: str
    part: tuple[tuple[int, int], ...]


Sums = Mapping[Place, jax.Array]  # float32 scalars


def probed(apply_fn: Callable[..., T]) -> Callable[..., T]:
    """A function ``(sums, params, *args, **kwargs)`` whose value is that of ``apply_fn``, and its derivative, too.

    But the "derivative" with respect to ``sums`` is, for each place in them, the sum over all rows and columns of the
    matmul's result of the *squared* gradient: what a small independent error of each number there costs in second
    order, if the loss is a log likelihood of labels that the model itself has drawn (the diagonal of the Fisher
    matrix). They need no memory of their own. A weight that is used several times, or by each step of a scan, has one
    sum.
    """

    def run(sums: Sums, params: object, *args: Any, **kwargs: Any) -> T:
        program = interpret.trace(apply_fn, params, *args, **kwargs)
        out, _ = interpret.run(program, params, *args, tap=_Probe(sums), **kwargs)
        return out

    return run


class _Probe:
    """A tap of `interpret.run` that looks at results only."""

    def __init__(self, sums: Sums) -> None:
        self._sums = sums

    def __call__(self, use: Use, x: jax.Array, expert: jax.Array | None = None) -> None:
        return None

    def after(self, use: Use, y: jax.Array) -> jax.Array:
        total = self._sums.get(Place(use.path, use.part))
        return y if total is None else _watched(y, total)


@jax.custom_vjp
def _watched(y: jax.Array, total: jax.Array) -> jax.Array:
    return y


def _forward(y: jax.Array, total: jax.Array) -> tuple[jax.Array, None]:
    return y, None


def _backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, jnp.square(gradient.astype(jnp.float32)).sum()


_watched.defvjp(_forward, _backward)
