"""Trace a model and follow every parameter leaf to the matmuls that read it."""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.tree_util import PyTreeDef

from awq_jax.paths import path_str
from awq_jax.qtensor import is_quantized
from awq_jax.trace import views
from awq_jax.trace.counters import Known, Numbers
from awq_jax.trace.jaxpr import Graph, Op, Operand, Use, Val, build
from awq_jax.trace.views import AxisRoles, View

SAME_SHAPE = frozenset(
    (
        *("convert_element_type", "copy", "copy_p", "sharding_constraint", "optimization_barrier", "name"),
        *("reduce_precision", "stop_gradient", "reshard", "mesh_cast"),
    )
)


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
      params: any pytree of arrays, `jax.ShapeDtypeStruct` or `QuantizedTensor` (traced as the float
        leaf it stands for).
      *args, **kwargs: arrays, abstract arrays or tracers become inputs of the program; anything
        else (Python numbers, flags, strings) is fixed in it.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    leaves = [jax.ShapeDtypeStruct(x.shape, x.dtype) if is_quantized(x) else x for _, x in flat]
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
    paths = [path_str(p) for p, _ in flat]
    shapes = {p: tuple(x.shape) for p, x in zip(paths, leaves, strict=True)}
    marks = _Marks({v: View.of_leaf(p, shapes[p]) for p, v in zip(paths, graph.ins, strict=False)})
    marks.visit(graph, "", 0)
    for v in graph.outs:
        marks.read(v, "the output")
    static = tuple(x for d, x in zip(dynamic, rest, strict=True) if not d)
    return Program(tuple(marks.uses), graph, shapes, marks.views, marks.readers, static, dynamic, args_tree, out_tree)


def _view(op: Op, view: View, src: Val, k: int, numbers: Numbers) -> View | None:
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
            return _picked(view, src.shape, out.shape, dict(enumerate(op.ins[1:])), numbers)
        case "gather" if op.ins[0] is src and math.prod(op.ins[1].shape) == len(p["dimension_numbers"].start_index_map):
            return _gathered(op, view, src, numbers)
        case "neg":
            return view.with_axes(view.axes, full=False)
        case "mul" | "div" if op.ins[0] is src and not isinstance(op.ins[1], Val) and np.ndim(op.ins[1]) == 0:
            return view.with_axes(view.axes, full=False)
        case "mul" if op.ins[1] is src and not isinstance(op.ins[0], Val) and np.ndim(op.ins[0]) == 0:
            return view.with_axes(view.axes, full=False)
    return None


def _picked(
    view: View, old: tuple[int, ...], new: tuple[int, ...], index: dict[int, Operand], numbers: Numbers
) -> View | None:
    """A part that begins at ``index`` of each axis: the same always, or a slice for each iteration of a loop."""
    starts, slices = [0] * len(old), {}
    for d, (a, b) in enumerate(zip(old, new, strict=True)):
        if a == b:
            continue
        start = numbers.constant(index[d])
        if start is not None:
            starts[d] = min(max(start, 0), a - b)
        elif b == 1 and (loop := numbers.goes_through(index[d], 0, a)) is not None:
            slices[d] = loop
        else:
            return None
    kept = tuple(a if d in slices else b for d, (a, b) in enumerate(zip(old, new, strict=True)))
    part = views.cut(view, starts, kept, old)
    for d, loop in slices.items():
        part = part and part.sliced(d, loop)
        part = part and part.with_axes((*part.axes[:d], (), *part.axes[d:]))
    return part


def _gathered(op: Op, view: View, src: Val, numbers: Numbers) -> View | None:
    """``jnp.take`` of one slice."""
    d = op.params["dimension_numbers"]
    known = numbers.of(op.ins[1])
    if known is None or d.operand_batching_dims:
        return None
    flat = known.values.reshape(-1) if known.loop is None else known.values.reshape(len(known.values), -1)
    scalars = {axis: Val((), np.dtype(np.int32)) for axis in d.start_index_map}
    for i, axis in enumerate(d.start_index_map):
        numbers.let(scalars[axis], Known(known.loop, flat[..., i]))
    part = _picked(view, src.shape, tuple(op.params["slice_sizes"]), dict(scalars), numbers)
    if part is None or part.problem:
        return None
    kept = [a for axis, a in enumerate(part.axes) if axis not in d.collapsed_slice_dims]
    axes: list[views.AxisFactors] = [()] * len(op.outs[0].shape)
    for at, axis in zip(d.offset_dims, kept, strict=True):
        axes[at] = axis
    return part.with_axes(tuple(axes))


@dataclasses.dataclass
class _Marks:
    """Follows parameter leaves through the program, collecting the matmuls that read them."""

    views: dict[Val, View]
    uses: list[Use] = dataclasses.field(default_factory=list)
    readers: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    numbers: Numbers = dataclasses.field(default_factory=Numbers)

    def read(self, v: Operand, by: str) -> None:
        if isinstance(v, Val) and v in self.views:
            self.readers.setdefault(self.views[v].path, []).append(by)

    def visit(self, graph: Graph, problem: str, depth: int) -> None:
        """Go through ``graph``, the body of ``depth`` loops; ``problem``: why nothing inside can be quantized."""
        before = len(self.uses)
        self.numbers.constants(graph)
        for op in graph.ops:
            held = [i for i, v in enumerate(op.ins) if isinstance(v, Val) and v in self.views]
            if op.bodies:
                self.enter(op, problem, depth)
            elif op.name == "dot_general" and len(held) == 1:
                self.matmul(op, held[0], problem)
            elif held:
                seen = {op.ins[i] for i in held}
                (v, *more) = seen
                new = [] if more else [_view(op, self.views[v], v, k, self.numbers) for k in range(len(op.outs))]
                if new and all(v is not None for v in new):
                    self.views.update((o, v) for o, v in zip(op.outs, new, strict=True) if v is not None)
                else:
                    for i in held:
                        self.read(op.ins[i], op.name)
            else:
                self.numbers.evaluate(op)
        graph.watched = len(self.uses) > before

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
                if length is None:
                    self.numbers.let(inner, self.numbers.of(outer) if i < fixed else None)
                if not isinstance(outer, Val) or outer not in self.views:
                    continue
                view = self.views[outer]
                if i < fixed:
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
                if isinstance(inner, Val) and inner in self.views:
                    self.views[out] = self.views[inner]
                elif out.dtype is not None:
                    self.numbers.let(out, self.numbers.of(inner))

    def matmul(self, op: Op, pos: int, problem: str) -> None:
        view = self.views[op.ins[pos]]
        contract, batch = op.params["dimension_numbers"]
        found = views.axis_roles(view, tuple(batch[pos]), tuple(contract[pos]))
        part = () if all(view.extent(d) == (0, n) for d, n in enumerate(view.shape)) else view.window
        where = (view.loops, view.scanned, part)
        if isinstance(found, AxisRoles):
            op.roles = found
            op.use = Use(len(self.uses), view.path, found.axes, problem, *where)
        else:
            op.use = Use(len(self.uses), view.path, "", found, *where)
        op.weight = pos
        self.uses.append(op.use)
