"""Parameter paths: the one way the library names a leaf of a parameter tree."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from awq_jax.errors import PlanError, WeightError
from awq_jax.qtensor import is_quantized

T = TypeVar("T")


def path_str(path: jax.tree_util.KeyPath) -> str:
    """A JAX key path as ``"layers/0/q_proj/kernel"``.

    Attribute keys of variable wrappers (``nnx.Param.value``, Linen partitioning boxes) are dropped.
    """
    named = tuple(key for key in path if getattr(key, "name", None) not in ("value", "raw_value"))
    return jax.tree_util.keystr(named, simple=True, separator="/")


def flatten(params: object) -> dict[str, Any]:
    """``{path: leaf}`` in tree order; a `QuantizedTensor` counts as one leaf.

    Raises:
      PlanError: two leaves have the same path, such as those of ``{"a/b": x, "a": {"b": y}}``.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    out: dict[str, Any] = {}
    for p, leaf in leaves:
        path = path_str(p)
        if path in out:
            raise PlanError(f"two parameters have the path {path}: rename one of them")
        out[path] = leaf
    return out


def map_with_path(f: Callable[[str, Any], object], params: T) -> T:
    """Map ``f(path, leaf)`` over ``params``, keeping its structure."""
    return jax.tree_util.tree_map_with_path(lambda p, leaf: f(path_str(p), leaf), params, is_leaf=is_quantized)


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
