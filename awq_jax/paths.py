"""Parameter paths: the one way the library names a leaf of a parameter tree."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.core.meta
import jax
from flax import nnx

from awq_jax.errors import PlanError, WeightError
from awq_jax.qtensor import is_quantized

T = TypeVar("T")


def path_str(path: jax.tree_util.KeyPath) -> str:
    """A JAX key path as ``"layers/0/q_proj/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_wrapper(x: object) -> bool:
    """Whether ``x`` only wraps a variable; the key of what is inside names nothing."""
    return isinstance(x, nnx.Variable | flax.core.meta.AxisMetadata)


def named_leaves(params: object) -> list[tuple[str, Any]]:
    """``(path, leaf)`` in tree order; a `QuantizedTensor` counts as one leaf.

    The keys of variable wrappers (``nnx.Param.value``, Linen partitioning boxes) are not part of a path.
    """

    def walk(tree: object, path: jax.tree_util.KeyPath) -> list[tuple[str, Any]]:
        out: list[tuple[str, Any]] = []
        stop = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: is_quantized(x) or _is_wrapper(x))[0]
        for keys, leaf in stop:
            where = (*path, *keys)
            if not _is_wrapper(leaf):
                out.append((path_str(where), leaf))
                continue
            inner = jax.tree_util.tree_flatten_with_path(leaf, is_leaf=lambda x, leaf=leaf: x is not leaf)[0]
            for key, child in inner:
                kept = tuple(k for k in key if getattr(k, "name", None) not in ("value", "raw_value"))
                out += walk(child, (*where, *kept))
        return out

    return walk(params, ())


def flatten(params: object) -> dict[str, Any]:
    """``{path: leaf}`` in tree order; a `QuantizedTensor` counts as one leaf.

    Raises:
      PlanError: two leaves have the same path, such as those of ``{"a/b": x, "a": {"b": y}}``.
    """
    out: dict[str, Any] = {}
    for path, leaf in named_leaves(params):
        if path in out:
            raise PlanError(f"two parameters have the path {path}: rename one of them")
        out[path] = leaf
    return out


def map_with_path(f: Callable[[str, Any], object], params: T) -> T:
    """Map ``f(path, leaf)`` over ``params``, keeping its structure."""
    tree: Any = jax.tree.structure(params, is_leaf=is_quantized)
    return jax.tree.unflatten(tree, [f(path, leaf) for path, leaf in named_leaves(params)])


def filled(like: T, leaves: Mapping[str, Any]) -> T:
    """``like`` with the leaves of another tree of the same paths, whatever its nodes and the types of its keys.

    Args:
      like: arrays, their shapes (`jax.eval_shape`) or `QuantizedTensor`; wrappers of variables stay.
      leaves: by path, as `flatten` gives them; a path may end in the ``value`` that Orbax writes of a wrapper.

    Raises:
      WeightError: a leaf is missing, of another shape, or one too many.
    """
    left = dict(leaves)

    def take(path: str, old: Any) -> object:
        found = [p for p in (path, f"{path}/value") if p in left]
        if not found:
            raise WeightError(f"{path} is missing among the {len(leaves)} parameters given: they are of another model")
        new = left.pop(found[0])
        shapes = getattr(new, "shape", None), getattr(old, "shape", None)
        if None not in shapes and shapes[0] != shapes[1]:
            raise WeightError(f"{path} has shape {shapes[0]}, and the model wants {shapes[1]}: it is of another model")
        return new

    out = map_with_path(take, like)
    if left:
        raise WeightError(f"the model has no parameter {min(left)}, which was given: it is of another model")
    return out


def nbytes(params: object) -> int:
    """Bytes of all arrays of ``params``, packed ones as they are stored."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(params) if hasattr(a, "dtype"))
