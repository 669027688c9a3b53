"""Which results are rearranged parameters: slices, transposes, parts, and the weights of chosen experts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import Protocol

import numpy as np

from awq_jax.trace import views
from awq_jax.trace.counters import Known, Numbers
from awq_jax.trace.jaxpr import Op, Operand, Val
from awq_jax.trace.views import Choice, View

SAME_SHAPE = frozenset(
    (
        *("convert_element_type", "copy", "copy_p", "sharding_constraint", "optimization_barrier", "name"),
        *("reduce_precision", "stop_gradient", "reshard", "mesh_cast", "pvary", "pcast"),
    )
)
REWRAPPED = SAME_SHAPE | {"broadcast_in_dim", "reshape", "squeeze", "transpose", "expand_dims"}


def view_of(op: Op, view: View, src: Val, k: int, known: Context) -> View | None:
    """Result ``k`` of an operation on a view, if it is a view again."""
    p, out = op.params, op.outs[k]
    match op.name:
        case name if name in SAME_SHAPE and len(op.ins) == 1:
            return view
        case "transpose":
            return view.with_axes(tuple(view.axes[d] for d in p["permutation"]))
        case "reshape" if p.get("dimensions") is None:
            return views.reshape(view, out.shape)
        case "squeeze":
            return view.with_axes(tuple(a for d, a in enumerate(view.axes) if d not in p["dimensions"]))
        case "broadcast_in_dim":
            return views.broadcast(view, src.shape, out.shape, p["broadcast_dimensions"])
        case "slice" if p["strides"] is None or set(p["strides"]) == {1}:
            return views.cut(view, p["start_indices"], out.shape, src.shape)
        case "split":
            starts = [sum(p["sizes"][:k]) if d == p["axis"] else 0 for d in range(len(src.shape))]
            return views.cut(view, starts, out.shape, src.shape)
        case "unstack":
            one = tuple(1 if d == p["axis"] else n for d, n in enumerate(src.shape))
            part = views.cut(view, [k if d == p["axis"] else 0 for d in range(len(src.shape))], one, src.shape)
            return part and part.with_axes(part.axes[: p["axis"]] + part.axes[p["axis"] + 1 :])
        case "dynamic_slice" if op.ins[0] is src:
            return _picked(op, view, src.shape, out.shape, dict(enumerate(op.ins[1:])), known)
        case "gather" if op.ins[0] is src and not p["dimension_numbers"].operand_batching_dims:
            return _gathered(op, view, src, known) or _chosen(op, view, src, known.sources)
        case "neg":
            return view.with_axes(view.axes, full=False)
        case "mul" | "div" if op.ins[0] is src and not isinstance(op.ins[1], Val) and np.ndim(op.ins[1]) == 0:
            return view.with_axes(view.axes, full=False)
        case "mul" if op.ins[1] is src and not isinstance(op.ins[0], Val) and np.ndim(op.ins[0]) == 0:
            return view.with_axes(view.axes, full=False)
    return None


def _picked(
    op: Op, view: View, old: tuple[int, ...], new: tuple[int, ...], index: dict[int, Operand], known: Context
) -> View | None:
    """A part that begins at ``index`` of each axis: the same always, a slice for each iteration, or a choice."""
    starts, slices, choices = [0] * len(old), {}, []
    for d, (a, b) in enumerate(zip(old, new, strict=True)):
        if a == b:
            continue
        start = known.numbers.constant(index[d])
        if start is not None:
            starts[d] = min(max(start, 0), a - b)
        elif b == 1 and (loop := known.numbers.goes_through(index[d], 0, a)) is not None:
            slices[d] = loop
        elif b == 1:
            choices.append(d)
        else:
            return None
    kept = tuple(a if d in slices or d in choices else b for d, (a, b) in enumerate(zip(old, new, strict=True)))
    part = views.cut(view, starts, kept, old)
    for d, loop in slices.items():
        part = part and part.sliced(d, loop)
        part = part and part.with_axes((*part.axes[:d], (), *part.axes[d:]))
    if not choices:
        return part
    if part is None or len(choices) > 1 or not part.axes[choices[0]]:
        return None
    (d,) = choices
    root = ("index", known.sources.root(index[d]))
    return views.choose(part, d, Choice(part.axes[d][0].axis, op.outs[0], root))


def _gathered(op: Op, view: View, src: Val, known: Context) -> View | None:
    """``jnp.take`` of one slice."""
    d = op.params["dimension_numbers"]
    if math.prod(op.ins[1].shape) != len(d.start_index_map):
        return None
    number = known.numbers.of(op.ins[1])
    if number is None:
        return None
    flat = number.values.reshape(-1) if number.loop is None else number.values.reshape(len(number.values), -1)
    scalars = {axis: Val((), np.dtype(np.int32)) for axis in d.start_index_map}
    for i, axis in enumerate(d.start_index_map):
        known.numbers.let(scalars[axis], Known(number.loop, flat[..., i]))
    part = _picked(op, view, src.shape, tuple(op.params["slice_sizes"]), dict(scalars), known)
    if part is None or part.problem:
        return None
    kept = [a for axis, a in enumerate(part.axes) if axis not in d.collapsed_slice_dims]
    axes: list[views.AxisFactors] = [()] * len(op.outs[0].shape)
    for at, axis in zip(d.offset_dims, kept, strict=True):
        axes[at] = axis
    return part.with_axes(tuple(axes))


def _chosen(op: Op, view: View, src: Val, sources: Sources) -> View | None:
    """``w[expert]``: the weights of many experts, one for each position."""
    d, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    cut = [axis for axis, n in enumerate(src.shape) if sizes[axis] != n]
    if len(cut) != 1 or cut[0] not in d.start_index_map or sizes[cut[0]] != 1 or not view.axes[cut[0]]:
        return None
    column = d.start_index_map.index(cut[0])
    root = ("index", sources.root(op.ins[1], column))
    part = views.choose(view, cut[0], Choice(view.axes[cut[0]][0].axis, op.outs[0], root))
    if part is None:
        return None
    kept = [a for axis, a in enumerate(part.axes) if axis not in d.collapsed_slice_dims]
    places = iter(views.positions(op.ins[1].shape[:-1]))
    at = dict(zip(d.offset_dims, kept, strict=True))
    return part.with_axes(tuple(at[i] if i in at else next(places) for i in range(len(op.outs[0].shape))))


def chosen_by_one_hot(op: Op, pos: int, view: View, sources: Sources) -> View | None:
    """``einsum("te,ekn->tkn", one_hot, w)``: what a product with a choice of experts picks."""
    (contract, batch), other = op.params["dimension_numbers"], op.ins[1 - pos]
    if batch[0] or len(contract[0]) != 1 or not isinstance(other, Val):
        return None
    dim, along = contract[pos][0], contract[1 - pos][0]
    if not view.axes[dim]:
        return None
    root = sources.one_hot(other)
    if root is None:
        return None
    part = views.choose(view, dim, Choice(view.axes[dim][0].axis, op.outs[0], ("index", root)))
    if part is None:
        return None
    places = views.positions([n for d, n in enumerate(other.shape) if d != along])
    rest = tuple(a for d, a in enumerate(part.axes) if d != dim)
    return part.with_axes((*rest, *places) if pos == 0 else (*places, *rest))


@dataclasses.dataclass
class Sources:
    """Where values come from, across calls.

    Attributes:
      made_by: value -> the operation that computes it.
      alias: operand of a called function -> what was passed, result of a call -> what was returned.
    """

    made_by: dict[Val, Op] = dataclasses.field(default_factory=dict)
    alias: dict[Val, Operand] = dataclasses.field(default_factory=dict)

    def resolve(self, v: Operand) -> Operand:
        """``v`` in the function that computes it."""
        while isinstance(v, Val) and v in self.alias:
            v = self.alias[v]
        return v

    def root(self, v: Operand, column: int = 0) -> Hashable:
        """What identifies whole numbers however they were wrapped on the way; ``column``: of indices ``[..., D]``."""
        while isinstance(v := self.resolve(v), Val) and (op := self.made_by.get(v)) is not None:
            if op.name == "select_n" and len(op.ins) == 3:  # i + n where i < 0
                roots = [self.root(x) for x in op.ins[1:]]
                sums = [self._added(x) for x in op.ins[1:]]
                if sums[0] == roots[1] or sums[1] == roots[0]:
                    return roots[1] if sums[0] == roots[1] else roots[0]
                return v
            elif op.name == "concatenate" and len(op.ins) > column and op.params["dimension"] == len(v.shape) - 1:
                v, column = op.ins[column], 0
            elif op.name in REWRAPPED and len(op.ins) == 1 and math.prod(np.shape(op.ins[0])) == math.prod(v.shape):
                v = op.ins[0]
            else:
                return v
        return v if isinstance(v, Val) else str(v)

    def one_hot(self, v: Operand) -> Hashable | None:
        """What identifies the numbers that a one-hot array was made of, None if it is none."""
        while isinstance(v := self.resolve(v), Val) and (op := self.made_by.get(v)) is not None:
            if op.name == "eq":
                pair = [self.resolve(x) for x in op.ins]
                counted = [isinstance(x, Val) and self._counts(x) for x in pair]
                return self.root(pair[counted.index(False)]) if sum(counted) == 1 else None
            if op.name not in REWRAPPED or len(op.ins) != 1:
                return None
            v = op.ins[0]
        return None

    def _added(self, v: Operand) -> Hashable | None:
        """What identifies ``i`` of ``i + n``."""
        v = self.resolve(v)
        op = self.made_by.get(v) if isinstance(v, Val) else None
        return self.root(op.ins[0]) if op is not None and op.name == "add" else None

    def _counts(self, v: Operand) -> bool:
        while isinstance(v := self.resolve(v), Val) and (op := self.made_by.get(v)) is not None:
            if op.name == "iota":
                return True
            if op.name not in REWRAPPED:
                return False
            v = op.ins[0]
        return False


class Context(Protocol):
    """What is known while a program is gone through."""

    numbers: Numbers
    sources: Sources
