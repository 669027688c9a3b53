"""Parameter paths: the one way the library names a leaf of a parameter tree."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from awq_jax.errors import PlanError
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


def nbytes(params: object) -> int:
    """Bytes of all arrays of ``params``, packed ones as they are stored."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(params) if hasattr(a, "dtype"))
