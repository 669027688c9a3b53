"""Packed parameter trees as nested dicts of plain arrays, which any tool for arrays can save, and back."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast, overload

from awq_jax import paths, qtensor
from awq_jax.kernels.layout import to_canonical
from awq_jax.qtensor import is_quantized

T = TypeVar("T")


def to_state(params: object) -> dict[str, Any]:
    """Nested dicts of arrays with text keys, for `flax.serialization.to_bytes`, Orbax or safetensors.

    A packed leaf becomes a dict of its arrays and, as ``static``, its sizes and settings (JSON in uint8).

    Args:
      params: any tree with or without `QuantizedTensor` leaves, or an NNX model.
    """
    out: dict[str, Any] = {}
    for path, leaf in paths.flatten(parameters(params)).items():
        *above, last = path.split("/")
        at = out
        for key in above:
            at = at.setdefault(key, {})
        at[last] = qtensor.to_state(to_canonical(leaf)) if is_quantized(leaf) else leaf
    return out


@overload
def from_state(state: Mapping[str, Any]) -> dict[str, Any]: ...
@overload
def from_state(state: Mapping[str, Any], like: T) -> T: ...
def from_state(state: Mapping[str, Any], like: object = None) -> object:
    """What `to_state` was given, from what it returned and another tool saved and loaded.

    Args:
      state: nested dicts of arrays.
      like: a tree with the paths of the model, such as its float parameters or their shapes (`jax.eval_shape`),
        or an NNX model (then an ``nnx.State`` is returned); the result is a tree of this kind. If its leaves are
        packed, ``state`` need not have ``static``: it may be what Orbax restored of the packed tree itself.

    Raises:
      WeightError: ``state`` is damaged, or it and ``like`` do not have the same leaves.
    """
    like = None if like is None else parameters(like)
    known = {} if like is None else paths.flatten(like)

    def built(tree: Any, path: str) -> object:
        if not isinstance(tree, Mapping):
            return tree
        if "qweight" in tree and "scales" in tree:
            return qtensor.from_state(known.get(path.removesuffix("/value")), tree)
        return {key: built(value, f"{path}/{key}".lstrip("/")) for key, value in tree.items()}

    tree = built(state, "")
    return tree if like is None else paths.filled(like, paths.flatten(tree))


def parameters(tree: object) -> object:
    """``tree``, or the ``nnx.Param`` variables of an NNX model."""
    from flax import nnx  # takes a third of a second

    return cast(object, nnx.state(tree, nnx.Param)) if isinstance(tree, nnx.Module) else tree
