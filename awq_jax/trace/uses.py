"""Trace a model and follow every parameter leaf to the matmuls that read it."""

import dataclasses
import math
from collections.abc import Callable, Hashable

import jax
import numpy as np
from jax.tree_util import PyTreeDef

from awq_jax.errors import PlanError
from awq_jax.paths import flatten
from awq_jax.qtensor import is_quantized
from awq_jax.trace import shards, views
from awq_jax.trace.counters import Numbers
from awq_jax.trace.distribute import distribute
from awq_jax.trace.grouped_calls import grouped
from awq_jax.trace.jaxpr import Graph, Op, Operand, Use, Val, build
from awq_jax.trace.rearranged import Sources, chosen_by_one_hot, view_of
from awq_jax.trace.views import AxisRoles, View


@dataclasses.dataclass(eq=False)
class Program:
    """A traced function ``fn(params, *args, **kwargs)``.

    Attributes:
      uses: its matmuls with parameters, in program order.
      graph: its operations; ``graph.ins`` starts with the parameter leaves, in tree order.
      leaves: path -> shape of every parameter leaf, in tree order.
      views: which values are rearranged parameter leaves.
      readers: path -> names of the operations other than matmuls that read the leaf.
      static: arguments that are not arrays: they are fixed in the program.
      dynamic: for each leaf of the arguments, whether it is an input of the program.
      args_tree, out_tree: how arguments and results are nested.
    """

    uses: tuple[Use, ...]
    graph: Graph
    leaves: dict[str, tuple[int, ...]]
    views: dict[Val, View]
    readers: dict[str, list[str]]
    static: tuple[object, ...]
    dynamic: tuple[bool, ...]
    args_tree: PyTreeDef
    out_tree: PyTreeDef


def trace(fn: Callable[..., object], params: object, *args: object, **kwargs: object) -> Program:
    """Record ``fn(params, *args, **kwargs)`` for the shapes given; nothing is computed.

    Args:
      params: any pytree of arrays, Python numbers, `jax.ShapeDtypeStruct` or `QuantizedTensor` (traced as the float
        leaf it stands for).
      *args, **kwargs: arrays, abstract arrays or tracers become inputs of the program; anything
        else (Python numbers, flags, strings) is fixed in it.

    Raises:
      PlanError: a parameter is no array, or two have one path.
    """
    named = flatten(params)
    tree = jax.tree.structure(params, is_leaf=is_quantized)
    leaves = [jax.ShapeDtypeStruct(x.shape, x.dtype) if is_quantized(x) else x for x in named.values()]
    for path, x in zip(named, leaves, strict=True):
        if not hasattr(x, "shape") and not isinstance(x, bool | int | float | complex):
            raise PlanError(
                f"{path} is a {type(x).__name__}, not an array: keep it out of the parameters (in the function, or as "
                "static data of the tree)"
            )
    rest, args_tree = jax.tree.flatten((args, kwargs))
    dynamic = tuple(hasattr(x, "shape") and hasattr(x, "dtype") for x in rest)
    out_tree: PyTreeDef

    def call(leaves: list[jax.Array], arrays: list[jax.Array]) -> list[jax.Array]:
        nonlocal out_tree
        it = iter(arrays)
        a, k = jax.tree.unflatten(args_tree, [next(it) if d else x for d, x in zip(dynamic, rest, strict=True)])
        out, out_tree = jax.tree.flatten(fn(jax.tree.unflatten(tree, leaves), *a, **k))
        return out

    closed = jax.make_jaxpr(call)(leaves, [x for d, x in zip(dynamic, rest, strict=True) if d])
    graph = build(closed, "")
    distribute(graph, set(graph.ins[: len(leaves)]))
    shapes = {p: tuple(np.shape(x)) for p, x in zip(named, leaves, strict=True)}
    # What is empty is no weight: a layer that is configured with no hidden channels.
    held = {v: View.of_leaf(p, shapes[p]) for p, v in zip(named, graph.ins, strict=False) if math.prod(shapes[p])}
    marks = _Marks(held)
    marks.visit(graph, "", 0)
    for v in graph.outs:
        marks.read(v, "the output")
    static = tuple(x for d, x in zip(dynamic, rest, strict=True) if not d)
    return Program(tuple(marks.uses), graph, shapes, marks.views, marks.readers, static, dynamic, args_tree, out_tree)


@dataclasses.dataclass
class _Marks:
    """Follows parameter leaves through the program, collecting the matmuls that read them."""

    views: dict[Val, View]
    uses: list[Use] = dataclasses.field(default_factory=list)
    readers: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    numbers: Numbers = dataclasses.field(default_factory=Numbers)
    chose: bool = False  # in the graph at hand, experts were chosen
    sources: Sources = dataclasses.field(default_factory=Sources)

    def read(self, v: Operand, by: str) -> None:
        if isinstance(v, Val) and v in self.views:
            self.readers.setdefault(self.views[v].path, []).append(by)

    def visit(self, graph: Graph, problem: str, depth: int) -> None:
        """Go through ``graph``, the body of ``depth`` loops; ``problem``: why nothing inside can be quantized."""
        before, self.chose = (len(self.uses), self.chose), False
        self.numbers.constants(graph)
        for op in graph.ops:
            held = [i for i, v in enumerate(op.ins) if isinstance(v, Val) and v in self.views]
            self.sources.made_by.update((o, op) for o in op.outs)
            rows = grouped(op) if held else None
            if rows is not None and rows.weight in held and rows.x not in held:
                op.grouped, op.bodies = rows, []
                self.matmul(op, rows.weight, problem)
            elif op.bodies:
                self.enter(op, problem, depth)
            elif op.name == "dot_general" and len(held) == 1:
                chosen = chosen_by_one_hot(op, held[0], self.views[op.ins[held[0]]], self.sources)
                if chosen is not None:
                    self.views[op.outs[0]], self.chose = chosen, True
                else:
                    self.matmul(op, held[0], problem)
            elif held:
                seen = {op.ins[i] for i in held}
                (v, *more) = seen
                new = [] if more else [view_of(op, self.views[v], v, k, self) for k in range(len(op.outs))]
                if new and all(v is not None for v in new):
                    self.views.update((o, v) for o, v in zip(op.outs, new, strict=True) if v is not None)
                    self.chose |= any(v.choice and v.choice.numbers in op.outs for v in new if v is not None)
                else:
                    for i in held:
                        self.read(op.ins[i], op.name)
            else:
                self.numbers.evaluate(op)
        graph.watched = len(self.uses) > before[0] or self.chose
        self.chose |= before[1]

    def enter(self, op: Op, problem: str, depth: int) -> None:
        if op.name == "while":
            op.trips = self.numbers.trip_count(op)
            if op.trips is None:
                problem = "it is used inside a while loop whose length is unknown until it runs"
        length = op.params["length"] if op.name == "scan" else op.trips
        if length is not None:
            self.numbers.enter_scan(op, depth, length, op.params.get("reverse", False))
        for body in op.bodies:
            fixed, carry = op.fixed(body)
            for i, (outer, inner) in enumerate(zip(op.body_inputs(body), body.ins, strict=True)):
                if op.is_call:
                    self.sources.alias[inner] = outer
                if length is None and np.shape(outer) == inner.shape:
                    self.numbers.let(inner, self.numbers.of(outer) if i < fixed else None)
                if not isinstance(outer, Val) or outer not in self.views:
                    continue
                view = self.views[outer]
                if outer.shape != inner.shape and op.name == "shard_map":
                    spec = [*op.params["in_specs"][i], *(None,) * len(inner.shape)]
                    parts = [(shards.names_of(a), n) for a, n in zip(spec, inner.shape, strict=False)]
                    self.views[inner] = view.split_over_devices(parts)
                elif i < fixed:
                    self.views[inner] = view.repeated_by_scan() if length is not None else view
                elif i >= fixed + carry:
                    self.views[inner] = view.sliced_by_scan()
                else:
                    self.read(outer, f"the state of a {op.name} loop")
            self.visit(body, problem, depth if length is None else depth + 1)
            if not op.is_call:
                for v in body.outs:
                    self.read(v, f"the result of a {op.name}")
        if op.is_call:
            for out, inner in zip(op.outs, op.bodies[0].outs, strict=True):
                self.sources.alias[out] = inner
                if isinstance(inner, Val) and inner in self.views:
                    self.views[out] = self.views[inner]
                elif out.dtype is not None:
                    self.numbers.let(out, self.numbers.of(inner))

    def experts(self, op: Op, view: View) -> Hashable | None:
        if op.grouped is not None:
            return ("sizes", self.sources.root(op.ins[op.grouped.sizes]))
        return view.choice.root if view.choice is not None else None

    def matmul(self, op: Op, pos: int, problem: str) -> None:
        view = self.views[op.ins[pos]]
        op.weight = pos
        if op.grouped is not None:
            whole = view.axes[op.grouped.group]
            found = views.axis_roles(view, (op.grouped.group,), op.grouped.contract[1])
            if len(whole) != 1 or view.choice is not None:
                found = "a ragged matmul groups what is not one of its axes"
        else:
            contracted, batched = op.dims
            found = views.axis_roles(view, tuple(batched[pos]), tuple(contracted[pos]))
        part = () if all(view.extent(d) == (0, n) for d, n in enumerate(view.shape)) else view.window
        where = (view.loops, view.scanned, part)
        if isinstance(found, AxisRoles):
            op.roles = found
            split = any(found.axes[axis] in "bk" for axis, _ in view.shards)
            op.use = Use(len(self.uses), view.path, found.axes, problem, *where, self.experts(op, view), split)
        else:
            op.use = Use(len(self.uses), view.path, "", found, *where)
        self.uses.append(op.use)
