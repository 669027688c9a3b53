"""A traced program cut at the inputs of some of its matmuls, into segments that run one after another.

Between two segments only values are kept that come of the inputs and are read later. What comes of parameters or
constants alone (a cast weight, a mask, the angles of positions) is made again in every segment that reads it: so each
segment may be run with other parameters.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from awq_jax.trace import interpret, layouts
from awq_jax.trace.jaxpr import Graph, Op, Operand, Val
from awq_jax.trace.uses import Program
from awq_jax.trace.views import Window

Key = tuple[str, Window]  # path and part of a weight
SAME = frozenset(("convert_element_type", "copy", "reduce_precision", "optimization_barrier"))


class Stream(NamedTuple):
    """What a matmul's result is added to: the value, and by how much the result is multiplied before."""

    value: Operand
    factor: tuple[Operand, ...]


class Given(NamedTuple):
    """A `Stream` as it is for some tokens: ``value [T, N]``, and by how much results are multiplied before."""

    value: ArrayLike
    factor: tuple[Operand, ...]

    def in_units(self) -> jax.Array:
        """The value in units of the result, float32."""
        value = jax.numpy.asarray(self.value).astype(jax.numpy.float32)
        for factor in self.factor:
            value = value / jax.numpy.asarray(factor).astype(jax.numpy.float32)
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """The place in a program before the first matmul of some weights, which read one input.

    Attributes:
      keys: the weights.
      op: the matmul, or the loop or branch that it is inside of.
      streams: of each weight whose result is added to a value that is there by then; see `Stream`.
      direct: the matmul is no part of a loop or a branch, and all rows meet the same weight.
    """

    keys: tuple[Key, ...]
    op: Op
    streams: Mapping[Key, Stream]
    direct: bool


class Segments:
    """A program in pieces.

    Args:
      program: which.
      groups: weights (path and part) that share an input, in the order of the program.

    Attributes:
      cuts: before each group.
      live: by number of cut, the values kept there; those after the last are the program's outputs.
    """

    def __init__(self, program: Program, groups: Sequence[Sequence[Key]]) -> None:
        self._program = program
        leaves = list(program.leaves)
        self._leaves = dict(zip(program.graph.ins[: len(leaves)], leaves, strict=True))
        self._inputs = list(program.graph.ins[len(leaves) :])
        self._consts: dict[Val, ArrayLike] = dict(program.graph.consts)
        self._ops, outs = self._inlined()
        self._outs = outs
        self._at = {o: i for i, op in enumerate(self._ops) for o in op.outs}
        self._moving = self._moved_by_inputs()
        self._readers: dict[Val, list[Op]] = {}
        for op in self._ops:
            for v in op.ins:
                if isinstance(v, Val):
                    self._readers.setdefault(v, []).append(op)
        self.cuts = [self._cut(keys) for keys in groups]
        starts = [self._ops.index(c.op) for c in self.cuts]
        assert starts == sorted(starts), "groups are not in the order of the program"
        self._starts = [*starts, len(self._ops)]
        self.live: list[list[Operand]] = [self._alive(i) for i in range(len(self.cuts))] + [list(self._outs)]

    @property
    def inputs(self) -> list[Val]:
        """What goes into the first segment."""
        return self._inputs

    def segment(self, number: int) -> tuple[Graph, tuple[str, ...]]:
        """The operations between cut ``number - 1`` and cut ``number``; the paths of parameters that they read.

        The graph takes those parameters, then what is alive before, and gives what is alive after.
        """
        before: Sequence[Operand] = self._inputs if number == 0 else self.live[number - 1]
        low = 0 if number == 0 else self._starts[number - 1]
        return self._between(before, self.live[number], range(low, self._starts[number]))

    def run(self, number: int, params: Mapping[str, ArrayLike], before: Sequence[ArrayLike]) -> list[ArrayLike]:
        """Segment ``number``: what is alive after it, from what is alive before."""
        graph, wanted = self.segment(number)
        return interpret.run_graph(self._program, graph, [*(params[p] for p in wanted), *before])[0]

    def input_of(self, number: int, alive: Sequence[ArrayLike]) -> jax.Array:
        """What the weights of a direct cut read, ``[*b, T, K]``, of what is alive there; in host memory if that is."""
        op = self.cuts[number].op
        return layouts.flatten_activation(op, self._value(op.ins[op.x], number, alive))

    def streams_of(self, number: int, alive: Sequence[ArrayLike]) -> list[Given]:
        """What results of the weights of a direct cut are added to, in the order of `Cut.streams`."""
        out = []
        for stream in self.cuts[number].streams.values():
            value = self._value(stream.value, number, alive)
            flat = (value if isinstance(value, np.ndarray) else jax.numpy.asarray(value)).reshape(
                -1, np.shape(value)[-1]
            )
            out.append(Given(flat, stream.factor))
        return out

    def tapped(
        self, number: int, params: Mapping[str, ArrayLike], alive: Sequence[ArrayLike], tap: interpret.Tap
    ) -> interpret.Taps:
        """What ``tap`` says of the inputs of the matmuls in the operation that a cut is before."""
        op = self.cuts[number].op
        graph, wanted = self._between(self.live[number], op.outs, range(self._ops.index(op), self._ops.index(op) + 1))
        return interpret.run_graph(self._program, graph, [*(params[p] for p in wanted), *alive], tap)[1]

    def _value(self, v: Operand, number: int, alive: Sequence[ArrayLike]) -> ArrayLike:
        return alive[self.live[number].index(v)] if isinstance(v, Val) else v

    def _inlined(self) -> tuple[list[Op], list[Operand]]:
        """All operations in order, calls with matmuls inside replaced by what they call."""
        ops: list[Op] = []

        def visit(graph: Graph, names: dict[Val, Operand]) -> None:
            self._consts.update(graph.consts)

            def named(v: Operand) -> Operand:
                return names.get(v, v) if isinstance(v, Val) else v

            for op in graph.ops:
                ins = [named(v) for v in op.ins]
                if op.is_call and op.name != "shard_map" and op.bodies and op.bodies[0].watched and op.use is None:
                    body = op.bodies[0]
                    inner = dict(zip(body.ins, ins, strict=True))
                    visit(body, inner)
                    names.update(
                        (o, inner.get(v, v) if isinstance(v, Val) else v)
                        for o, v in zip(op.outs, body.outs, strict=True)
                    )
                else:
                    ops.append(dataclasses.replace(op, ins=ins))

        names: dict[Val, Operand] = {}
        visit(self._program.graph, names)
        return ops, [names.get(v, v) if isinstance(v, Val) else v for v in self._program.graph.outs]

    def _moved_by_inputs(self) -> set[Val]:
        """Values that come of the inputs, not of parameters and constants alone."""
        moving = set(self._inputs)
        for op in self._ops:
            if any(isinstance(v, Val) and v in moving for v in op.ins):
                moving.update(op.outs)
        return moving

    def _cut(self, keys: Sequence[Key]) -> Cut:
        wanted = set(keys)
        op = next(op for op in self._ops if _reads(op, wanted))
        use = op.use
        direct = use is not None and not use.loops and use.experts is None and op.grouped is None
        streams = {}
        if direct:
            at = self._ops.index(op)
            for other in self._ops:
                if other.use is not None and (key := (other.use.path, other.use.part)) in wanted:
                    stream = self._added_to(other, at)
                    if stream is not None:
                        streams[key] = stream
        return Cut(tuple(keys), op, streams, direct)

    def _added_to(self, op: Op, at: int) -> Stream | None:
        """What the result of a matmul goes into by a sum, if that is there before operation ``at``."""
        if op.x != 0 or op.dims[1][0] or not op.outs[0].shape:
            return None
        y, factors = op.outs[0], []
        width = y.shape[-1]
        while True:
            readers = self._readers.get(y, [])
            if len(readers) != 1 or any(o is y for o in self._outs):
                return None
            (reader,) = readers
            if len(reader.outs) != 1 or not reader.outs[0].shape or reader.outs[0].shape[-1] != width:
                return None
            others = [v for v in reader.ins if v is not y]
            moving = [v for v in others if isinstance(v, Val) and v in self._moving]
            bias = reader.name == "add" and not moving
            if reader.name in SAME or bias or (reader.name == "reshape" and not others):
                pass
            elif reader.name in ("mul", "div") and not moving and reader.ins[0] is y and np.size(others[0]) == 1:
                if isinstance(others[0], Val):
                    return None
                factors.append(others[0] if reader.name == "mul" else 1 / np.asarray(others[0], np.float32))
            elif reader.name == "add" and len(moving) == 1 and len(others) == 1:
                z = moving[0]
                assert isinstance(z, Val)
                there = z in self._inputs or self._at.get(z, at) < at
                same = z.shape == reader.outs[0].shape and z.is_float
                return Stream(z, tuple(factors)) if there and same else None
            else:
                return None
            y = reader.outs[0]

    def _alive(self, number: int) -> list[Operand]:
        """Values that come of the inputs, are there before a cut, and are read from there on."""
        at = self._starts[number]
        later = {v for op in self._ops[at:] for v in op.ins if isinstance(v, Val)}
        later |= {v for v in self._outs if isinstance(v, Val)}
        later |= {s.value for c in self.cuts[number:] for s in c.streams.values() if isinstance(s.value, Val)}
        there = [*self._inputs, *(o for op in self._ops[:at] for o in op.outs)]
        return [v for v in there if v in later and v in self._moving]

    def _between(
        self, before: Sequence[Operand], after: Sequence[Operand], span: range
    ) -> tuple[Graph, tuple[str, ...]]:
        """A graph of what makes ``after`` of ``before``: operations within ``span``, and what needs no input."""
        have = {v for v in before if isinstance(v, Val)}
        chosen: set[int] = set()
        todo = [v for v in after if isinstance(v, Val) and v not in have]
        params: dict[Val, None] = {}
        consts: dict[Val, ArrayLike] = {}
        while todo:
            v = todo.pop()
            if v in have:
                continue
            have.add(v)
            if v in self._leaves:
                params[v] = None
            elif v in self._consts:
                consts[v] = self._consts[v]
            else:
                at = self._at[v]
                assert at in span or v not in self._moving, "a value is not kept from one segment to the next"
                chosen.add(at)
                have.update(self._ops[at].outs)
                todo += [u for u in self._ops[at].ins if isinstance(u, Val)]
        ops = [self._ops[i] for i in sorted(chosen)]
        ordered = [v for v in self._leaves if v in params]
        paths = tuple(self._leaves[v] for v in ordered)
        alive = [v for v in before if isinstance(v, Val)]
        return Graph([*ordered, *alive], list(after), ops, consts, watched=True), paths


def _reads(op: Op, keys: set[Key]) -> bool:
    """Whether an operation is, or holds, a matmul with one of some weights."""
    if op.use is not None and (op.use.path, op.use.part) in keys:
        return True
    return any(_reads(inner, keys) for body in op.bodies for inner in body.ops)
