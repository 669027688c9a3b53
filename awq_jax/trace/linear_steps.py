"""Weights that something linear is done to before they are multiplied: what a matmul reads, as a tree of such steps.

``x @ concatenate([q, kv], 1)`` is ``concatenate([x @ q, x @ kv], 1)``, and ``x @ (w * gain)`` is ``(x @ w) * gain``.
The left sides compute a weight anew at every call, so no packed one can stand for it; the right sides multiply by
parameters as they are. Here a weight is read as a tree: concatenations, gains, sums and paddings, of parameters that
are transposed, reshaped and cast. `distribute` multiplies by such a tree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.trace.jaxpr import Op, Operand, Val

Shape = tuple[int, ...]
SAME = frozenset(("copy", "copy_p", "sharding_constraint", "optimization_barrier", "name", "stop_gradient"))
RESHAPES = frozenset(("reshape", "squeeze", "expand_dims", "broadcast_in_dim"))
REARRANGES = SAME | RESHAPES | {"transpose", "convert_element_type"}
SUMS = frozenset(("add", "sub", "add_any"))
LINEAR = SUMS | {"concatenate", "stack", "mul", "div", "neg", "pad"}


class NotDistributable(Exception):
    """A step cannot be moved behind the product."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One rearrangement: the new shape, the order of axes, or the new dtype."""

    kind: Literal["reshape", "transpose", "cast", "broadcast"]
    to: Any

    def apply(self, a: jax.Array) -> jax.Array:
        if self.kind == "transpose":
            return jnp.transpose(a, self.to)
        if self.kind == "cast":
            return a.astype(self.to)
        return jnp.broadcast_to(a, self.to) if self.kind == "broadcast" else a.reshape(self.to)


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """A value of the program, rearranged."""

    value: Operand
    shape: Shape
    steps: tuple[Step, ...] = ()

    def then(self, step: Step, shape: Shape) -> Leaf:
        return Leaf(self.value, shape, (*self.steps, step))

    def read(self, env: Mapping[Val, jax.Array]) -> jax.Array:
        a = env[self.value] if isinstance(self.value, Val) else jnp.asarray(self.value)
        for step in self.steps:
            a = step.apply(a)
        return a


@dataclasses.dataclass(frozen=True, eq=False)
class Cat:
    """Parts side by side along an axis. ``whole`` here and below: the value as the program computes it."""

    whole: Leaf
    axis: int
    parts: tuple[Tree, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Gain:
    """``part`` times (or over) ``by``, whose axes have the size of the part's or 1."""

    whole: Leaf
    part: Tree
    by: Leaf
    over: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Sum:
    """The sum of parts, each with its sign."""

    whole: Leaf
    parts: tuple[Tree, ...]
    signs: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Padded:
    """``part`` with zeros before and after it along each axis."""

    whole: Leaf
    part: Tree
    padding: tuple[tuple[int, int], ...]


Tree = Leaf | Cat | Gain | Sum | Padded


def shape_of(tree: Tree) -> Shape:
    """Of the value."""
    return tree.shape if isinstance(tree, Leaf) else tree.whole.shape


def leaves(tree: Tree) -> list[Leaf]:
    """What is multiplied, gains left out."""
    if isinstance(tree, Leaf):
        return [tree]
    parts = tree.parts if isinstance(tree, Cat | Sum) else (tree.part,)
    return [x for part in parts for x in leaves(part)]


def operands(tree: Tree) -> list[Leaf]:
    """Every leaf, gains included."""
    if isinstance(tree, Leaf):
        return [tree]
    parts: Sequence[Tree] = tree.parts if isinstance(tree, Cat | Sum) else (tree.part,)
    more = [tree.by] if isinstance(tree, Gain) else []
    return [*(x for part in parts for x in operands(part)), *more]


def read(v: Operand, made_by: Mapping[Val, Op], derived: set[Val]) -> Tree:
    """How ``v`` is made; ``derived``: values computed from parameters and constants alone."""
    whole = Leaf(v, tuple(np.shape(v)))
    op = made_by.get(v) if isinstance(v, Val) and v in derived else None
    if op is None or not isinstance(v, Val) or op.bodies or len(op.outs) != 1:
        return whole
    if op.name in REARRANGES and len(op.ins) == 1:
        before = read(op.ins[0], made_by, derived)
        if isinstance(before, Leaf) or math.prod(shape_of(before)) != math.prod(v.shape):
            return whole
        if op.name in SAME:
            return before
        if op.name == "convert_element_type":
            return rearrange(before, Step("cast", v.dtype), whole)
        if op.name == "transpose":
            return rearrange(before, Step("transpose", tuple(op.params["permutation"])), whole)
        if op.name == "reshape" and op.params.get("dimensions") is not None:
            return whole
        return rearrange(before, Step("reshape", v.shape), whole)
    if op.name == "concatenate":
        return Cat(whole, op.params["dimension"], tuple(read(x, made_by, derived) for x in op.ins))
    if op.name == "stack":
        at = op.params["axis"]
        one = (*v.shape[:at], 1, *v.shape[at + 1 :])
        parts = (read(x, made_by, derived) for x in op.ins)
        return Cat(whole, at, tuple(_rearranged(part, Step("reshape", one)) for part in parts))
    if op.name == "neg":
        return Gain(whole, read(op.ins[0], made_by, derived), _one(-1.0, v))
    if op.name in ("mul", "div"):
        for pos in (0, 1) if op.name == "mul" else (0,):
            by = _thin(op.ins[1 - pos], v, made_by)
            if by is not None and isinstance(op.ins[pos], Val):
                return Gain(whole, read(op.ins[pos], made_by, derived), by, op.name == "div")
    alike = all(isinstance(x, Val) and x.shape == v.shape and _thin(x, v, made_by) is None for x in op.ins)
    if op.name in SUMS and alike:
        signs = (1, -1 if op.name == "sub" else 1)
        return Sum(whole, tuple(read(x, made_by, derived) for x in op.ins), signs)
    if op.name == "pad" and _is_zero(op.ins[1], made_by):
        config = tuple(op.params["padding_config"])
        if all(low >= 0 and high >= 0 and not inner for low, high, inner in config):
            return Padded(whole, read(op.ins[0], made_by, derived), tuple((low, high) for low, high, _ in config))
    return whole


def _is_zero(v: Operand, made_by: Mapping[Val, Op]) -> bool:
    while isinstance(v, Val) and v in made_by and made_by[v].name == "convert_element_type":
        v = made_by[v].ins[0]
    return not isinstance(v, Val) and not np.any(np.asarray(v))


def _one(number: float, like: Val) -> Leaf:
    return Leaf(np.asarray(number, like.dtype), (1,) * len(like.shape), (Step("reshape", (1,) * len(like.shape)),))


def _thin(v: Operand, like: Val, made_by: Mapping[Val, Op]) -> Leaf | None:
    """``v`` as it was before it was broadcast to the shape of ``like``; None if it was not."""
    rank = len(like.shape)
    if not isinstance(v, Val):
        return _one(float(np.asarray(v)), like) if np.ndim(v) == 0 else None
    if math.prod(v.shape) == 1:
        return Leaf(v, (1,) * rank, (Step("reshape", (1,) * rank),))
    op = made_by.get(v)
    while op is not None and op.name in SAME | {"convert_element_type"} and isinstance(op.ins[0], Val):
        v, op = op.ins[0], made_by.get(op.ins[0])
    if op is None or op.name != "broadcast_in_dim":
        return None
    source, dims = op.ins[0], op.params["broadcast_dimensions"]
    shape = [1] * rank
    for d, n in zip(dims, np.shape(source), strict=True):
        shape[d] = n
    if math.prod(shape) == math.prod(like.shape):
        return None
    return Leaf(source, tuple(shape), (Step("reshape", tuple(shape)), Step("cast", like.dtype)))


def rearrange(tree: Tree, step: Step, whole: Leaf) -> Tree:
    """The tree of a rearranged value; ``whole``, a leaf, where the tree does not survive it."""
    try:
        return _rearranged(tree, step, whole)
    except NotDistributable:
        return whole


def _rearranged(tree: Tree, step: Step, whole: Leaf | None = None) -> Tree:
    old = shape_of(tree)
    if step.kind == "cast":
        new = old
    elif step.kind == "transpose":
        new = tuple(old[d] for d in step.to)
    else:
        new = tuple(step.to)
    if isinstance(tree, Leaf):
        return tree.then(step, new)
    whole = whole or tree.whole.then(step, new)
    if isinstance(tree, Sum):
        return Sum(whole, tuple(_rearranged(part, step) for part in tree.parts), tree.signs)
    if isinstance(tree, Gain):
        by = tree.by if step.kind == "cast" else _gain(tree.by, step, old, new)
        return Gain(whole, _rearranged(tree.part, step), by, tree.over)
    if isinstance(tree, Padded):
        if step.kind == "reshape":
            raise NotDistributable
        order = range(len(old)) if step.kind == "cast" else step.to
        padding = tuple(tree.padding[d] for d in order)
        return Padded(whole, _rearranged(tree.part, step), padding)
    if step.kind == "cast":
        return Cat(whole, tree.axis, tuple(_rearranged(part, step) for part in tree.parts))
    if step.kind == "transpose":
        axis = tuple(step.to).index(tree.axis)
        return Cat(whole, axis, tuple(_rearranged(part, step) for part in tree.parts))
    axis, unit = _axis_after(tree.axis, old, new)
    parts = []
    for part in tree.parts:
        inner = math.prod(shape_of(part)[tree.axis :])
        if inner % unit:
            raise NotDistributable
        parts.append(_rearranged(part, Step("reshape", (*new[:axis], inner // unit, *new[axis + 1 :]))))
    return Cat(whole, axis, tuple(parts))


def _axis_after(axis: int, old: Shape, new: Shape) -> tuple[int, int]:
    """Where what lies side by side along ``axis`` lies after a reshape, and how many elements a step there has."""
    lead = math.prod(old[:axis])
    for d, n in enumerate(new):
        if n > 1 and math.prod(new[:d]) == lead:
            return d, math.prod(new[d + 1 :])
    raise NotDistributable


def _gain(by: Leaf, step: Step, old: Shape, new: Shape) -> Leaf:
    if step.kind == "transpose":
        return by.then(step, tuple(by.shape[d] for d in step.to))
    full: list[int] = []
    out: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):  # blocks of axes that a reshape makes of each other
        a, b = i, j
        i, j = i + 1, j + 1
        while math.prod(old[a:i]) != math.prod(new[b:j]):
            if math.prod(old[a:i]) < math.prod(new[b:j]):
                i += 1
            else:
                j += 1
        varies = any(n > 1 for n in by.shape[a:i])
        full += old[a:i] if varies else by.shape[a:i]
        out += new[b:j] if varies else (1,) * len(new[b:j])
    return by.then(Step("broadcast", tuple(full)), tuple(full)).then(Step("reshape", tuple(out)), tuple(out))
