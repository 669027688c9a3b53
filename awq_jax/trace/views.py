"""Axis bookkeeping: which axes of a parameter leaf the axes of a reshaped, transposed view are made of."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple


class AxisFactor(NamedTuple):
    """A run of one leaf axis: ``size`` steps of ``stride`` elements along leaf axis ``axis``."""

    axis: int
    stride: int
    size: int


AxisFactors = tuple[AxisFactor, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """A value that holds the elements of one parameter leaf, rearranged.

    Attributes:
      path: the leaf.
      shape: the leaf's own shape, scanned axes included.
      axes: per axis of the value, the leaf factors it is made of, outermost first. Axes of size 1 have none.
      loops: one letter per enclosing scan: ``s`` if it slices the leaf's leading axis, ``r`` if every
        iteration sees the same.
      full: the value is the whole leaf with no arithmetic but a cast, so a packed leaf can stand for it.
      problem: why the leaf cannot be a quantizable weight when seen this way; "" if it can.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[AxisFactors, ...]
    loops: str = ""
    full: bool = True
    problem: str = ""

    @property
    def scanned(self) -> int:
        """How many leading leaf axes enclosing scans have sliced away."""
        return self.loops.count("s")

    @classmethod
    def of_leaf(cls, path: str, shape: tuple[int, ...]) -> View:
        """The leaf itself."""
        return cls(path, tuple(shape), tuple((AxisFactor(d, 1, n),) if n != 1 else () for d, n in enumerate(shape)))

    def with_axes(self, axes: tuple[AxisFactors, ...], *, full: bool = True) -> View:
        """The same leaf seen through other axes."""
        return dataclasses.replace(self, axes=axes, full=self.full and full)

    def sliced_by_scan(self) -> View:
        """What the body of a scan sees of this value."""
        lead = self.scanned
        n = self.shape[lead] if lead < len(self.shape) else 0
        whole: AxisFactors = (AxisFactor(lead, 1, n),) if n != 1 else ()
        problem = self.problem
        if not self.axes or self.axes[0] != whole or not self.full:
            problem = "a loop slices it along an axis that is not its first"
        full = self.full and not problem
        return dataclasses.replace(self, axes=self.axes[1:], loops=self.loops + "s", full=full, problem=problem)

    def repeated_by_scan(self) -> View:
        """What the body of a scan sees of a value that every iteration reads."""
        return dataclasses.replace(self, loops=self.loops + "r")


def reshape(view: View, shape: tuple[int, ...]) -> View | None:
    """The view as ``shape``, or None if a leaf axis would be cut unevenly."""
    todo = [f for axis in view.axes for f in axis][::-1]
    axes: list[AxisFactors] = []
    for size in shape:
        axis: list[AxisFactor] = []
        while size > 1:
            if not todo:
                return None
            f = todo.pop()
            if size % f.size == 0:
                axis.append(f)
                size //= f.size
            elif f.size % size == 0:
                inner = f.size // size
                axis.append(AxisFactor(f.axis, f.stride * inner, size))
                todo.append(AxisFactor(f.axis, f.stride, inner))
                size = 1
            else:
                return None
        axes.append(_merge(axis))
    return None if todo else view.with_axes(tuple(axes))


def _merge(axis: list[AxisFactor]) -> AxisFactors:
    """Join neighbours that a former reshape had split."""
    out: list[AxisFactor] = []
    for f in axis:
        if out and out[-1].axis == f.axis and out[-1].stride == f.stride * f.size:
            out[-1] = AxisFactor(f.axis, f.stride, out[-1].size * f.size)
        else:
            out.append(f)
    return tuple(out)


def broadcast(view: View, old: tuple[int, ...], shape: tuple[int, ...], dims: tuple[int, ...]) -> View | None:
    """``broadcast_in_dim``, as long as it only adds axes of size 1."""
    if math.prod(old) != math.prod(shape):
        return None
    axes: list[AxisFactors] = [()] * len(shape)
    for d, a in zip(dims, view.axes, strict=True):
        axes[d] = a
    return view.with_axes(tuple(axes))


def cut(view: View, old: tuple[int, ...], new: tuple[int, ...]) -> View | None:
    """A slice with steps of one, of axes that are one run of a leaf axis each."""
    axes: list[AxisFactors] = []
    for axis, a, b in zip(view.axes, old, new, strict=True):
        if a != b and len(axis) != 1:
            return None
        axes.append(axis if a == b else (axis[0]._replace(size=b),) if b != 1 else ())
    return view.with_axes(tuple(axes), full=False)


class AxisRoles(NamedTuple):
    """How a matmul reads a weight.

    Attributes:
      axes: roles of the leaf's axes, ``s``, ``b``, ``k``, ``n``.
      b, k, n: factors of the dot's batch, contracted and output axes, in the dot's order.
    """

    axes: str
    b: AxisFactors
    k: AxisFactors
    n: AxisFactors


def axis_roles(view: View, batch: tuple[int, ...], contract: tuple[int, ...]) -> AxisRoles | str:
    """Roles of the leaf's axes in a dot that treats the view's axes so, or why there are none."""
    if view.problem:
        return view.problem
    role_of = ["b" if d in batch else "k" if d in contract else "n" for d in range(len(view.axes))]
    roles: dict[int, str] = {}
    covered: dict[int, int] = {}
    for axis, role in zip(view.axes, role_of, strict=True):
        for f in axis:
            if roles.setdefault(f.axis, role) != role:
                return f"its axis {f.axis} is partly contracted and partly kept"
            covered[f.axis] = covered.get(f.axis, 1) * f.size
    for d, role in roles.items():
        if role != "n" and covered[d] != view.shape[d]:
            return f"the matmul reads only a part of its axis {d}"
    for d in range(view.scanned, len(view.shape)):
        if d not in roles:
            if view.shape[d] != 1:
                return (
                    f"each matmul reads one slice of its axis {d}: loop over it with jax.lax.scan, "
                    "or keep the slices as parameters of their own"
                )
            roles[d] = "n" if "k" in roles.values() else "k"
    axes = "s" * view.scanned + "".join(roles[d] for d in range(view.scanned, len(view.shape)))
    if "k" not in axes or "n" not in axes:
        return "it is a vector: the matmul has no output axis"
    order = (*batch, *contract, *(d for d in range(len(view.axes)) if role_of[d] == "n"))
    pick = {r: tuple(f for d in order if role_of[d] == r for f in view.axes[d]) for r in "bkn"}
    return AxisRoles(axes, pick["b"], pick["k"], pick["n"])


def leaf_order(factors: AxisFactors) -> list[int]:
    """The permutation that puts ``factors`` in the order the leaf stores them."""
    return sorted(range(len(factors)), key=lambda i: (factors[i].axis, -factors[i].stride))


def sizes(factors: AxisFactors) -> tuple[int, ...]:
    """Of each factor."""
    return tuple(f.size for f in factors)
