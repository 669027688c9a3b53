"""Arguments of a model as the arrays in them, and the rest, which is part of the program."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.tree_util import PyTreeDef


class Fixed:
    """An argument that is part of the program. Unlike in Python, ``1``, ``1.0`` and ``True`` differ."""

    def __init__(self, value: object):
        self.value = value

    def __hash__(self) -> int:
        return hash(self.value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fixed) or type(self.value) is not type(other.value):
            return False
        return repr(self.value) == repr(other.value) if isinstance(self.value, float) else self.value == other.value


@dataclasses.dataclass(frozen=True)
class Form:
    """How arguments are nested, and what of them is no array; a static argument of `jax.jit`.

    Attributes:
      tree: of ``(args, kwargs)``.
      fixed: for each leaf, None if it is an array.
    """

    tree: PyTreeDef
    fixed: tuple[Fixed | None, ...]

    def join(self, arrays: Iterable[object]) -> tuple[tuple[object, ...], dict[str, Any]]:
        """``(args, kwargs)`` with these arrays."""
        it = iter(arrays)
        args, kwargs = jax.tree.unflatten(self.tree, [next(it) if f is None else f.value for f in self.fixed])
        return args, kwargs


def split(args: tuple[object, ...], kwargs: Mapping[str, object]) -> tuple[list[object], Form]:
    """The arrays among arguments, concrete, abstract or traced, and the rest."""
    leaves, tree = jax.tree.flatten((args, dict(kwargs)))
    fixed = tuple(None if hasattr(x, "shape") and hasattr(x, "dtype") else Fixed(x) for x in leaves)
    return [x for x, f in zip(leaves, fixed, strict=True) if f is None], Form(tree, fixed)
