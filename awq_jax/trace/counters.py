"""Whole numbers that are known before a program runs: constants, and the counters of loops.

A loop that reads `w[i]` with its counter `i` slices `w` as a scan over `w` does. To see that, small integers are
followed through the program: their values in every iteration of one enclosing loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from awq_jax.trace.jaxpr import Graph, Op, Operand, Val

MOST = 1 << 16  # numbers that are followed; a loop of more iterations is not


class Known(NamedTuple):
    """Numbers known in advance.

    Attributes:
      loop: number of the enclosing loop (0 is the outermost) whose iterations are the leading axis of
        ``values``, in the order in which that loop stacks its results; None if they do not depend on a loop.
      values: ``[iterations, *shape]`` or ``[*shape]``.
    """

    loop: int | None
    values: np.ndarray


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "max": np.maximum, "min": np.minimum,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "and": np.logical_and, "or": np.logical_or, "not": np.logical_not, "clamp": lambda lo, x, hi: np.clip(x, lo, hi),
    "select_n": lambda which, *cases: np.choose(np.asarray(which, int), cases), "copy": lambda x: x,
    "stop_gradient": lambda x: x, "rem": np.fmod, "convert_element_type": lambda x: x,
}  # fmt: skip


class Numbers:
    """What is known of the values of a program."""

    def __init__(self) -> None:
        self._known: dict[Val, Known] = {}

    def of(self, v: Operand) -> Known | None:
        """What is known of ``v``."""
        if isinstance(v, Val):
            return self._known.get(v)
        try:
            values = np.asarray(v)
        except Exception:  # a tracer, or a key
            return None
        return Known(None, values) if values.size <= MOST and values.dtype.kind in "iub" else None

    def let(self, v: Val, known: Known | None) -> None:
        """Take down what ``v`` is."""
        if known is not None and known.values.size <= MOST:
            self._known[v] = known

    def constants(self, graph: Graph) -> None:
        """Those that a graph has captured."""
        for v, value in graph.consts.items():
            if np.size(value) <= MOST:
                self.let(v, self.of(value))

    def evaluate(self, op: Op) -> None:
        """Do ``op`` if everything it reads is known."""
        if len(op.outs) != 1 or not op.outs[0].is_whole:
            return
        shape = op.outs[0].shape
        if op.name == "iota" and not op.ins:
            if math.prod(shape) <= MOST:
                along = np.moveaxis(np.indices(shape, sparse=False), 0, -1)[..., op.params["dimension"]]
                self.let(op.outs[0], Known(None, along))
            return
        known = [self.of(v) for v in op.ins]
        loops = {k.loop for k in known if k is not None and k.loop is not None}
        if None in known or len(loops) > 1 or not known:
            return
        loop = loops.pop() if loops else None
        ins = [k.values if k.loop == loop or k.values.ndim == 0 else k.values[None] for k in known if k]
        lead = () if loop is None else (max(len(x) for x in ins if x.ndim),)
        if op.name in ELEMENTWISE:
            values = np.broadcast_to(ELEMENTWISE[op.name](*ins), lead + shape)
        elif op.name in ("reshape", "squeeze", "broadcast_in_dim") and ins[0].size == math.prod(lead + shape):
            values = ins[0].reshape(lead + shape)
        else:
            return
        self.let(op.outs[0], Known(loop, values))

    def enter_scan(self, op: Op, loop: int, length: int, reverse: bool) -> None:
        """Take down the counters that the body of a loop carries, and the numbers that a scan goes through."""
        body = op.bodies[-1]
        fixed, carry = op.fixed(body)
        outer = op.body_inputs(body)
        for i, (o, v) in enumerate(zip(outer, body.ins, strict=True)):
            known = self.of(o)
            if known is None:
                continue
            if i < fixed:
                self.let(v, known)
            elif i >= fixed + carry and known.loop is None:
                self.let(v, Known(loop, known.values))
            elif i < fixed + carry and known.loop is None and known.values.ndim == 0:
                step = _step(body, v, i - fixed)
                if step is not None:
                    values = known.values + step * np.arange(length)
                    self.let(v, Known(loop, values[::-1] if reverse else values))

    def trip_count(self, op: Op) -> int | None:
        """How often a while loop runs, if its counter alone decides that."""
        cond, body = op.bodies
        fixed = op.fixed(cond)[0]
        probe = Numbers()
        probe._known = dict(self._known)
        for i, (o, v) in enumerate(zip(op.body_inputs(cond), cond.ins, strict=True)):
            known = self.of(o)
            if known is None or known.loop is not None:
                continue
            if i < fixed:
                probe.let(v, known)
            else:
                at = op.fixed(body)[0] + i - fixed
                step = _step(body, body.ins[at], i - fixed)
                if step is not None and known.values.ndim == 0:
                    probe.let(v, Known(0, known.values + step * np.arange(MOST)))
        probe.constants(cond)
        for inner in cond.ops:
            probe.evaluate(inner)
        goes_on = probe.of(cond.outs[0])
        if goes_on is None or goes_on.loop != 0 or goes_on.values.all():
            return None
        return int(np.argmin(goes_on.values))

    def goes_through(self, v: Operand, start: int, size: int) -> int | None:
        """The loop in whose iterations ``v`` is ``start, start + 1, ...``, ``size`` in all; None if there is none."""
        known = self.of(v)
        if known is None or known.loop is None or known.values.shape != (size,):
            return None
        return known.loop if (known.values == start + np.arange(size)).all() else None

    def constant(self, v: Operand) -> int | None:
        """``v`` if it is one number, the same always."""
        known = self.of(v)
        return int(known.values) if known is not None and known.loop is None and known.values.ndim == 0 else None


def _step(body: Graph, v: Val, k: int) -> int | None:
    """By how much a carried number grows in each iteration."""
    out = body.outs[k]
    if out is v:
        return 0
    for op in body.ops:
        if op.outs == [out] and op.name in ("add", "sub"):
            others: Sequence[Operand] = [x for x in op.ins if x is not v]
            if len(others) == 1 and not isinstance(others[0], Val) and np.ndim(others[0]) == 0:
                step = int(np.asarray(others[0]))
                return step if op.name == "add" else -step if op.ins[0] is v else None
    return None
