"""Split a parameter tree into what can be trained and what cannot, for `jax.grad`."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from awq_jax.errors import ShapeError
from awq_jax.qtensor import is_quantized

T = TypeVar("T")  # a parameter tree


def split(params: T) -> tuple[T, T]:
    """``params`` as two trees of its structure: the float leaves, and all others.

    `jax.grad` refuses integer leaves, and packed weights are made of them. Differentiate with
    respect to the first tree and put the parameters together inside the function::

        floats, rest = awq_jax.trainable.split(qparams)
        grads = jax.grad(lambda f: loss(awq_jax.trainable.merge(f, rest)))(floats)

    (``jax.grad(..., allow_int=True)`` on the whole tree works too; it gives ``float0`` for the
    integer arrays, and gradients for the scales as well.)

    Returns:
      ``(floats, rest)``; each has None where the other has a leaf. A `QuantizedTensor` is one leaf
      and belongs to ``rest``.
    """

    def is_float(x: object) -> bool:
        return not is_quantized(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact)

    floats = jax.tree.map(lambda x: x if is_float(x) else None, params, is_leaf=is_quantized)
    rest = jax.tree.map(lambda x: None if is_float(x) else x, params, is_leaf=is_quantized)
    return floats, rest


def merge(floats: T, rest: T) -> T:
    """Inverse of `split`.

    Raises:
      ShapeError: if the trees are not the two halves of one tree.
    """

    def pick(a: object, b: object) -> object:
        if a is not None and b is not None:
            raise ShapeError("both trees have a value for one leaf; pass the two results of one split")
        return b if a is None else a

    try:
        return jax.tree.map(pick, floats, rest, is_leaf=lambda x: x is None or is_quantized(x))
    except ShapeError:
        raise
    except ValueError as e:
        raise ShapeError(f"not the two halves of one parameter tree: {e}") from None


def labels(params: T, names: tuple[str, str] = ("train", "frozen")) -> T:
    """A label for each leaf, for `optax.multi_transform`: of float leaves the first, of all others the second.

    A `QuantizedTensor` is labelled as one, so that no moments are made for its arrays::

        optimizer = optax.multi_transform(
            {"train": optax.adamw(1e-4), "frozen": optax.set_to_zero()}, awq_jax.trainable.labels
        )

    Args:
      params: parameters, or gradients of the same structure.
      names: the two labels.
    """

    def label(x: object) -> object:
        if is_quantized(x):
            return jax.tree.map(lambda _: names[1], x)
        return names[0] if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else names[1]

    return jax.tree.map(label, params, is_leaf=is_quantized)


def without_float0(gradients: T, params: T) -> T:
    """Gradients of ``jax.grad(..., allow_int=True)`` as an optimizer takes them.

    Of integer leaves JAX gives ``float0``, which `optax.apply_updates` cannot add; they become zeros of the leaf's own
    dtype, and so do the gradients of a packed weight's scales: what is packed stays as it is.

    Raises:
      ShapeError: the trees are not of one structure.
    """

    def one(g: Any, p: Any) -> Any:
        return jnp.zeros_like(p) if g.dtype == jax.dtypes.float0 else g

    def leaf(g: Any, p: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, p) if is_quantized(p) else one(g, p)

    try:
        return jax.tree.map(leaf, gradients, params, is_leaf=is_quantized)
    except ValueError as e:
        raise ShapeError(f"these are not gradients of these parameters: {e}") from None
