"""Axis bookkeeping: which axes of a parameter leaf the axes of a reshaped, transposed view are made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple


class AxisFactor(NamedTuple):
    """A run of one leaf axis: ``size`` steps of ``stride`` elements along leaf axis ``axis``."""

    axis: int
    stride: int
    size: int


AxisFactors = tuple[AxisFactor, ...]
POSITION = -1  # the axis of a factor that is none of the leaf's, but goes through what was chosen


class Choice(NamedTuple):
    """Which expert's weight stands at each position.

    Attributes:
      axis: the leaf's axis of experts.
      numbers: the result of the operation that chose, by which the interpreter knows the numbers.
      root: identifies the numbers: two choices with one root are the same.
    """

    axis: int
    numbers: Hashable
    root: Hashable


Window = tuple[tuple[int, int], ...]
"""Where a part of a leaf begins, and its size, along each of the leaf's axes; () is the whole leaf."""


@dataclasses.dataclass(frozen=True)
class View:
    """A value that holds the elements of one parameter leaf, or of a part of it, rearranged.

    Attributes:
      path: the leaf.
      shape: the leaf's own shape, scanned axes included.
      axes: per axis of the value, the leaf factors it is made of, outermost first. Axes of size 1 have none.
      loop_axes: of each enclosing loop, outermost first, the leaf axis that it slices; None if every iteration
        sees the same.
      window: of each leaf axis, where the part begins and its size; () for the whole leaf.
      choice: if an expert was chosen for each position (``w[expert]``), the leaf axis of experts, and what identifies
        the numbers chosen. Axes of positions have factors of the axis `POSITION`.
      shards: leaf axes that a `shard_map` around splits, and the axes of the mesh that it is split over; ``shape`` is
        that of a device's part.
      full: no arithmetic but a cast was done, so a packed leaf can stand for the value.
      problem: why the leaf cannot be a quantizable weight when seen this way; "" if it can.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[AxisFactors, ...]
    loop_axes: tuple[int | None, ...] = ()
    window: Window = ()
    choice: Choice | None = None
    shards: tuple[tuple[int, tuple[str, ...]], ...] = ()
    full: bool = True
    problem: str = ""

    @property
    def loops(self) -> str:
        """One letter per enclosing loop: ``s`` if it slices the leaf, ``r`` if it does not."""
        return "".join("r" if axis is None else "s" for axis in self.loop_axes)

    @property
    def scanned(self) -> tuple[int, ...]:
        """The leaf axes that enclosing loops slice, in the order of the loops."""
        return tuple(axis for axis in self.loop_axes if axis is not None)

    def extent(self, axis: int) -> tuple[int, int]:
        """Where the part begins along a leaf axis, and its size."""
        return self.window[axis] if self.window else (0, self.shape[axis])

    @classmethod
    def of_leaf(cls, path: str, shape: tuple[int, ...]) -> View:
        """The leaf itself."""
        return cls(path, tuple(shape), tuple((AxisFactor(d, 1, n),) if n != 1 else () for d, n in enumerate(shape)))

    def with_axes(self, axes: tuple[AxisFactors, ...], *, full: bool = True) -> View:
        """The same leaf seen through other axes."""
        return dataclasses.replace(self, axes=axes, full=self.full and full)

    def sliced_by_scan(self) -> View:
        """What the body of a scan sees of this value."""
        return self.repeated_by_scan().sliced(0, len(self.loop_axes))

    def repeated_by_scan(self) -> View:
        """What the body of a scan sees of a value that every iteration reads."""
        return dataclasses.replace(self, loop_axes=(*self.loop_axes, None))

    def split_over_devices(self, parts: Sequence[tuple[tuple[str, ...], int]]) -> View:
        """What a device sees in a `shard_map` of a leaf that lies on several.

        Args:
          parts: of each axis of the value, the axes of the mesh that split it, and its size on a device.
        """
        axes, shape, shards = list(self.axes), list(self.shape), list(self.shards)
        for d, (names, size) in enumerate(parts):
            old = math.prod(f.size for f in self.axes[d])
            if size == old:
                continue
            first = self.axes[d][0]
            rest = old // first.size
            if self.window or self.choice or size % rest or first.stride * first.size != self.shape[first.axis]:
                why = self.problem or "a shard_map splits what several of its axes were made into"
                return dataclasses.replace(self, full=False, problem=why)
            share = first._replace(size=size // rest)
            axes[d] = ((share,) if share.size != 1 else ()) + self.axes[d][1:]
            shape[first.axis] = first.stride * share.size
            shards.append((first.axis, names))
        return dataclasses.replace(self, axes=tuple(axes), shape=tuple(shape), shards=tuple(shards))

    def sliced(self, dim: int, loop: int) -> View:
        """The value without its axis ``dim``, which the enclosing loop number ``loop`` goes through once."""
        rest = self.axes[:dim] + self.axes[dim + 1 :]
        problem, axis = self.problem, None
        factors = self.axes[dim] if dim < len(self.axes) else ()
        if len(factors) == 1 and factors[0] == (factors[0].axis, 1, self.extent(factors[0].axis)[1]):
            axis = factors[0].axis
        elif not factors and (ones := [d for d, n in enumerate(self.shape) if n == 1 and d not in self.scanned]):
            axis = ones[0]
        if axis is None or not self.full or self.loop_axes[loop] is not None:
            problem = problem or "a loop slices what several of its axes were made into"
        loops = (*self.loop_axes[:loop], axis, *self.loop_axes[loop + 1 :])
        full = self.full and not problem
        return dataclasses.replace(self, axes=rest, loop_axes=loops, full=full, problem=problem)


def choose(view: View, dim: int, choice: Choice) -> View | None:
    """The view with an expert chosen along ``dim``, of which size 1 is left; None if it holds no experts."""
    axis = view.axes[dim]
    if view.choice is not None or sum(map(bool, view.axes)) < 3 or not view.full:
        return None
    if len(axis) != 1 or axis[0] != (choice.axis, 1, view.shape[choice.axis]) or view.problem:
        return None
    return dataclasses.replace(view, axes=(*view.axes[:dim], (), *view.axes[dim + 1 :]), choice=choice)


def positions(shape: Sequence[int]) -> tuple[AxisFactors, ...]:
    """Axes that go through what was chosen."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    return tuple((AxisFactor(POSITION, s, n),) if n != 1 else () for s, n in zip(strides, shape, strict=True))


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


def cut(view: View, starts: Sequence[int], new: tuple[int, ...], old: tuple[int, ...]) -> View | None:
    """A slice with steps of one that begins at ``starts``, of axes that are one run of a leaf axis each."""
    axes: list[AxisFactors] = []
    window = list(view.window or ((0, n) for n in view.shape))
    full = view.full
    for axis, start, a, b in zip(view.axes, starts, old, new, strict=True):
        if a == b:
            axes.append(axis)
            continue
        if len(axis) != 1:
            return None
        f = axis[0]
        begin, size = window[f.axis]
        if f.stride * f.size == size:
            window[f.axis] = (begin + start * f.stride, b * f.stride)
        else:
            full = False  # the part is no run of the leaf's axis
        axes.append((f._replace(size=b),) if b != 1 else ())
    return dataclasses.replace(view, axes=tuple(axes), window=tuple(window), full=full)


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
    roles: dict[int, str] = dict.fromkeys(view.scanned, "s")
    if view.choice is not None:
        if any(f.axis != POSITION for d in batch for f in view.axes[d]) or any(
            f.axis == POSITION for d in contract for f in view.axes[d]
        ):
            return "experts are chosen along axes that are not those of the activation's rows"
        roles[view.choice.axis] = "b"
    covered: dict[int, int] = {}
    for axis, role in zip(view.axes, role_of, strict=True):
        for f in axis:
            if f.axis == POSITION:
                continue
            if roles.setdefault(f.axis, role) != role:
                return f"its axis {f.axis} is partly contracted and partly kept"
            covered[f.axis] = covered.get(f.axis, 1) * f.size
    for d, size in covered.items():
        if roles[d] != "n" and size != view.extent(d)[1]:
            return f"the matmul reads only a part of its axis {d}"
    for d, n in enumerate(view.shape):
        if d in roles:
            continue
        if n != 1 and view.extent(d)[1] != 1:
            return f"the matmul reads only a part of its axis {d}"
        # A slice of a stack is one of a batch, an axis of size 1 whatever is missing.
        roles[d] = "b" if n != 1 else "n" if "k" in roles.values() else "k"
    axes = "".join(roles[d] for d in range(len(view.shape)))
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
