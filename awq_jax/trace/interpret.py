"""A model as a program: trace it, watch its matmuls, run it with packed weights.

`trace` (in `uses`) records a function as a graph of plain objects (`jaxpr`) and finds its matmuls
with parameters; `run` runs the graph again with a tap on them, or with another matmul in their place.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from awq_jax.errors import ShapeError
from awq_jax.paths import flatten
from awq_jax.qtensor import QuantizedTensor, is_quantized
from awq_jax.trace import layouts, packed, shardings, shards, views
from awq_jax.trace.jaxpr import REMAT, Graph, Op, Operand, Use, Val, bind
from awq_jax.trace.uses import Program, trace
from awq_jax.trace.views import View, Window

__all__ = ["Matmul", "Program", "Tap", "Use", "run", "trace"]

Tap = Callable[[Use, jax.Array], object]  # returns a pytree of arrays, or None
Matmul = Callable[..., jax.Array]
Value = ArrayLike | QuantizedTensor
Taps = dict[int, object]  # what the tap returned, by `Use.index`
Values = tuple[Value, ...]
Enter = Callable[[Graph, Sequence[Value]], list[Value]]
RunBody = Callable[..., tuple[list[ArrayLike], Taps]]


def run(
    program: Program,
    params: object,
    *args: object,
    tap: Tap | None = None,
    matmul: Matmul | None = None,
    **kwargs: object,
) -> Any:
    """Run ``program`` with these parameters and inputs (of the traced shapes).

    Args:
      params: the tree that was traced, with new values; any leaf may be a `QuantizedTensor`.
      tap: ``tap(use, x)`` is called at every matmul with a parameter that has no ``reason``, with
        the activation as ``[*b, T, K]``: the dot's batch axes, all its free axes flattened, and K
        in the order the leaf stores its ``k`` axes. It returns a pytree of arrays, or None. If it has a
        method ``after``, that makes of ``(use, y)``, ``y`` the matmul's own result, what takes its place.
      matmul: ``matmul(x, q) -> y [*b, T, N]`` takes the place of a matmul with a packed leaf;
        without it, and wherever else a packed leaf is read, the leaf is dequantized.

    Where each row meets the weight of an expert that was chosen for it, both are called with ``x [T, K]`` and
    ``expert=``, int32 ``[T]``, which is -1 for rows without any; ``q`` is ``[E, K, N]`` then.

    Returns:
      The function's output; with ``tap``, ``(output, {use.index: tapped})``. Taps inside a scan are
      stacked on a new leading axis; in the branch of a cond that was not taken they are zero.

    Raises:
      ShapeError: if a parameter or an argument does not have the traced structure or shape.
    """
    flat = flatten(params)
    found = {path: tuple(np.shape(x)) for path, x in flat.items()}
    for path, shape in program.leaves.items():
        if found.get(path) != shape:
            raise ShapeError(f"{path}: traced with shape {shape}, called with {found.get(path)}; trace again")
    rest, tree = jax.tree.flatten((args, kwargs))
    if tree != program.args_tree:
        raise ShapeError("the arguments are not nested as when the function was traced; trace again")
    inputs, fixed = ([x for x, d in zip(rest, program.dynamic, strict=True) if d == is_in] for is_in in (True, False))
    if any(a is not b and a != b for a, b in zip(fixed, program.static, strict=True)):
        raise ShapeError(f"an argument that is not an array changed since tracing: {fixed}; trace again")
    for x, v in zip(inputs, program.graph.ins[len(flat) :], strict=True):
        if tuple(np.shape(x)) != v.shape:
            raise ShapeError(f"an argument of shape {np.shape(x)} was traced with {v.shape}; trace again")
    outs, taps = _Interpreter(program.views, tap, matmul, {}).graph(program.graph, [*flat.values(), *inputs])
    out = jax.tree.unflatten(program.out_tree, outs)
    return (out, taps) if tap else out


def run_graph(
    program: Program, graph: Graph, values: Sequence[Value], tap: Tap | None = None
) -> tuple[list[ArrayLike], Taps]:
    """A part of a program (see `awq_jax.trace.segments`): its results, and what the tap returned by `Use.index`.

    Args:
      program: whose part it is.
      graph: the part.
      values: of ``graph.ins``.
      tap: see `run`.
    """
    return _Interpreter(program.views, tap, None, {}).graph(graph, values)


@dataclasses.dataclass(frozen=True)
class _Interpreter:
    views: dict[Val, View]
    tap: Tap | None
    matmul: Matmul | None
    chosen: dict[Hashable, jax.Array]  # numbers of experts, by `views.Choice.numbers`
    manual: tuple[str, ...] = ()  # axes of the mesh that the shard_map around splits by
    checked: bool = False  # JAX knows along which of them a value differs

    def graph(self, graph: Graph, args: Sequence[Value]) -> tuple[list[ArrayLike], Taps]:
        env: dict[Val, Value] = {**graph.consts, **dict(zip(graph.ins, args, strict=True))}
        taps: Taps = {}

        def read(v: Operand) -> Value:
            return env[v] if isinstance(v, Val) else v

        for op in graph.ops:
            ins = [read(v) for v in op.ins]
            env.update(zip(op.outs, self.op(op, ins, taps), strict=True))
        outs = [self.dense(v, read(v)) for v in graph.outs]
        return outs, taps

    def dense(self, val: Operand, x: Value) -> ArrayLike:
        """A packed leaf as the float array the program has at ``val``."""
        if not isinstance(x, QuantizedTensor):
            return x
        assert isinstance(val, Val)
        view = self.views[val]
        factors = [f for axis in view.axes for f in axis]
        order = views.leaf_order(tuple(factors))
        window = _live(view, view.window)
        if window and packed.can_cut(x, window):
            w = packed.cut(x, window).dequantize()
        else:
            w = x.dequantize()
            w = w[tuple(slice(start, start + size) for start, size in window)] if window else w
        if view.choice is not None:
            numbers = self.chosen[view.choice.numbers].reshape(-1)
            w = jnp.moveaxis(w, view.choice.axis - sum(d < view.choice.axis for d in view.scanned), 0)
            w = jnp.where((numbers >= 0).reshape(-1, *(1,) * (w.ndim - 1)), w[numbers], 0)
        w = w.reshape([factors[i].size for i in order])
        return jnp.transpose(w, np.argsort(order).tolist()).reshape(val.shape).astype(val.dtype)

    def op(self, op: Op, ins: list[Value], taps: Taps) -> Sequence[Value]:
        held = [i for i, x in enumerate(ins) if is_quantized(x)]
        if op.bodies and (held or (self.tap and any(b.watched for b in op.bodies))):
            return self.nested(op, ins, taps)
        if op.roles and (self.tap or (held and self.matmul)):
            return [self.site(op, ins, taps)]
        if len(op.outs) == 1 and (view := self.views.get(op.outs[0])) and view.choice:
            if view.choice.numbers is op.outs[0]:
                self.chosen[op.outs[0]] = self.numbers(op, ins, view.choice.axis)
            if len(held) == 1:
                return [ins[held[0]]]
        if held == [0] and all(o in self.views and self.views[o].full for o in op.outs):
            return [self.taken(op, o, ins) for o in op.outs]
        return bind(op, [self.dense(v, x) for v, x in zip(op.ins, ins, strict=True)])

    def taken(self, op: Op, out: Val, ins: list[Value]) -> Value:
        """A packed leaf for a rearrangement of it: itself, or the slice that a loop's counter picks.

        Which part of it is meant stands in the view and is taken where the part is multiplied.
        """
        before, after = self.views[op.ins[0]], self.views[out]
        q = ins[0]
        gone: list[int] = list(before.scanned)
        for axis in after.scanned:
            if axis in gone:
                continue
            assert isinstance(q, QuantizedTensor)
            (d,) = (d for d, factors in enumerate(before.axes) if any(f.axis == axis for f in factors))
            picks = dict(enumerate(ins[1:]))
            if op.name == "gather":
                order = op.params["dimension_numbers"].start_index_map
                picks = {a: jnp.reshape(self.dense(op.ins[1], ins[1]), -1)[i] for i, a in enumerate(order)}
            q = packed.index_batch(q, axis - sum(g < axis for g in gone), jnp.asarray(picks[d]))
            gone.append(axis)
        return q

    def site(self, op: Op, ins: list[Value], taps: Taps) -> jax.Array:
        """A matmul with a parameter."""
        assert op.use is not None
        assert op.roles is not None
        x, w = self.dense(op.ins[op.x], ins[op.x]), ins[op.weight]
        flat, options = layouts.flatten_activation(op, shardings.on_every_device(x)), {}
        if self.views[op.ins[op.weight]].choice is not None:
            places = math.prod(f.size for f in op.roles.n if f.axis == views.POSITION)  # that all rows go through
            lead = math.prod(flat.shape[:-2])
            flat = jnp.broadcast_to(flat.reshape(lead, 1, *flat.shape[-2:]), (lead, places, *flat.shape[-2:]))
        if (expert := self.experts(op, ins, flat)) is not None:
            flat, options = flat.reshape(-1, flat.shape[-1]), {"expert": expert}
        if self.tap and not op.use.reason:
            seen, numbered, count = shards.whole(op, self.views[op.ins[op.weight]], flat, options)
            tapped = self.tap(op.use, seen, **numbered)
            if tapped is not None:
                # The model goes on only when the tap is done: otherwise a compiler may keep every
                # activation of the model for one great round of taps at the end.
                x, tapped = jax.lax.optimization_barrier((x, tapped))
                if self.manual:
                    tapped = shards.summed(tapped, self.manual, self.checked, count)
                taps[op.use.index] = tapped
                ins = [x if i == op.x else a for i, a in enumerate(ins)]
        if self.matmul and is_quantized(w) and (part := self.part(op, w)) is not None:
            y = layouts.restore_output(op, self.matmul(flat, jax.tree.map(shardings.on_every_device, part), **options))
            return shardings.as_typed(y, op.result_sharding)
        y = bind(op, [self.dense(v, a) for v, a in zip(op.ins, ins, strict=True)])[0]
        return y if (after := getattr(self.tap, "after", None)) is None else after(op.use, y)

    def numbers(self, op: Op, ins: list[Value], axis: int) -> jax.Array:
        """Which expert an operation chooses for each position, int32 with the positions' shape; -1 for none."""
        (pos,) = (i for i, v in enumerate(op.ins) if isinstance(v, Val) and v in self.views and self.views[v].full)
        before = self.views[op.ins[pos]]
        (d,) = (d for d, factors in enumerate(before.axes) if any(f.axis == axis for f in factors))
        if op.name == "dot_general":
            other = jnp.asarray(self.dense(op.ins[1 - pos], ins[1 - pos]))
            along = op.dims[0][1 - pos][0]
            return jnp.where((other != 0).any(along), jnp.argmax(other, along), -1).astype(jnp.int32)
        index: ArrayLike = jnp.asarray(ins[1 + d])
        if op.name == "gather":
            index = jnp.asarray(ins[1])[..., op.params["dimension_numbers"].start_index_map.index(d)]
        return jnp.clip(index, 0, before.shape[axis] - 1).astype(jnp.int32)

    def experts(self, op: Op, ins: list[Value], flat: jax.Array) -> jax.Array | None:
        """The expert of each row of the activation, int32 ``[T]``; None if rows do not choose."""
        if op.grouped is not None:
            ends = jnp.cumsum(self.dense(op.ins[op.grouped.sizes], ins[op.grouped.sizes]))
            row = jnp.arange(flat.shape[-2], dtype=ends.dtype)
            found = jnp.searchsorted(ends, row, side="right")
            return jnp.where(found < len(ends), found, -1).astype(jnp.int32)
        choice = self.views[op.ins[op.weight]].choice
        if choice is None:
            return None
        numbers = self.chosen[choice.numbers].reshape(-1)
        assert op.roles is not None
        order = [f for f in (*op.roles.b, *op.roles.n) if f.axis == views.POSITION]
        if order:  # the dot may go through positions in another order than they were chosen in
            by_stride = sorted(order, key=lambda f: -f.stride)
            places = jnp.transpose(numbers.reshape([f.size for f in by_stride]), [by_stride.index(f) for f in order])
            numbers = places.reshape(-1)
        rows = math.prod(flat.shape[:-1])
        return jnp.repeat(numbers, rows // numbers.size, total_repeat_length=rows)

    def part(self, op: Op, w: QuantizedTensor) -> QuantizedTensor | None:
        """What of a packed leaf the matmul reads; None if it cannot be multiplied as it is packed."""
        assert op.use is not None
        assert op.roles is not None
        use, view = op.use, self.views[op.ins[op.weight]]
        if w.live_axes != use.axes.replace("s", "") or not view.full:
            return None
        if (view.choice is not None or op.grouped is not None) and w.live_axes.count("b") != 1:
            return None
        if not use.part:
            return w
        window = list(_live(view, use.part))
        if not packed.can_cut(w, tuple(window)):
            return None
        kept = {f.axis for f in op.roles.b} | ({view.choice.axis} if view.choice else set())
        live = [d for d in range(len(use.axes)) if d not in use.scanned]
        for at in reversed(range(len(live))):
            if use.axes[live[at]] == "b" and live[at] not in kept:
                w = packed.index_batch(w, at, window.pop(at)[0])
        return packed.cut(w, tuple(window)) if window != [(0, n) for n in w.shape] else w

    def nested(self, op: Op, ins: list[Value], taps: Taps) -> list[Value]:
        """A call or loop with packed leaves or tapped matmuls inside."""

        def enter(body: Graph, values: Sequence[Value]) -> list[Value]:
            outer = op.body_inputs(body)
            return [
                self.dense(o, x) if is_quantized(x) and not (v in self.views and self.views[v].full) else x
                for o, v, x in zip(outer, body.ins, values, strict=True)
            ]

        def run(body: Graph, *values: Value) -> tuple[list[ArrayLike], Taps]:
            return self.graph(body, list(values))

        outs: Sequence[Value]
        if op.name == "shard_map":
            outs, new = self.shard_map(op, enter(op.bodies[0], ins))
        elif op.is_call:
            body = op.bodies[0]
            call = run
            if op.name in REMAT:
                call = jax.checkpoint(
                    run, prevent_cse=op.params["prevent_cse"], policy=op.params["policy"], static_argnums=(0,)
                )
            outs, new = call(body, *enter(body, ins))
        elif op.name == "scan":
            outs, new = self.scan(op, enter(op.bodies[0], ins))
        elif op.name == "while" and op.trips is not None and self.tap:
            a, b = op.params["cond_nconsts"], op.params["body_nconsts"]
            outs, new = self.scan(op, enter(op.bodies[1], ins[a:]))
        elif op.name == "while":
            a, b = op.params["cond_nconsts"], op.params["body_nconsts"]
            test, step = (enter(body, x) for body, x in zip(op.bodies, (ins[:a] + ins[a + b :], ins[a:]), strict=True))
            silent = dataclasses.replace(self, tap=None)
            outs = jax.lax.while_loop(
                lambda c: silent.graph(op.bodies[0], [*test[:a], *c])[0][0],
                lambda c: silent.graph(op.bodies[1], [*step[:b], *c])[0],
                [self.dense(v, x) for v, x in zip(op.bodies[1].ins[b:], step[b:], strict=True)],
            )
            new = {}
        else:
            outs, new = self.cond(op, ins, enter, run)
        taps.update(new)
        return [*outs]

    def shard_map(self, op: Op, ins: list[Value]) -> tuple[list[Value], Taps]:
        """Each device has its part of a packed leaf, as of a float one; what taps return is summed over the devices."""
        p, graph = op.params, op.bodies[0]
        axes = tuple(p["newly_manual_axes"] if "newly_manual_axes" in p else p["manual_axes"])  # the latter: jax 0.10.0
        inside = dataclasses.replace(self, manual=(*self.manual, *axes), checked=p["check_vma"])
        specs: list[Any] = list(p["in_specs"])
        for i, (x, outer, v) in enumerate(zip(ins, op.ins, graph.ins, strict=True)):
            if isinstance(x, QuantizedTensor):
                cut = shards.specs_of(x, self.views[outer], self.views[v])
                ins[i], specs[i] = (self.dense(outer, x), specs[i]) if cut is None else (x, cut)

        def body(*values: Value) -> tuple[tuple[Value, ...], Taps]:
            mine = [
                shards.local(x, self.views[v]) if isinstance(x, QuantizedTensor) else x
                for x, v in zip(values, graph.ins, strict=True)
            ]
            outs, new = inside.graph(graph, mine)
            return tuple(outs), new

        outs, new = jax.shard_map(
            body,
            mesh=p["mesh"],
            in_specs=tuple(specs),
            out_specs=(tuple(p["out_specs"]), PartitionSpec()),
            axis_names=frozenset(axes),
            check_vma=p["check_vma"],
        )(*ins)
        return [*outs], new

    def scan(self, op: Op, ins: list[Value]) -> tuple[list[Value], Taps]:
        """A scan, or a while loop whose length is known."""
        body = op.bodies[-1]
        consts, carry = op.fixed(body)
        rest = list(zip(body.ins, op.body_inputs(body), ins, strict=True))[consts + carry :]
        # A packed leaf is sliced where it lies along the axis in question: moving that axis would copy it.
        kept = {v: (o, x) for v, o, x in rest if is_quantized(x) and self.moved(v, o, x)}

        def step(state: Values, given: tuple[jax.Array, Values]) -> tuple[Values, tuple[Values, Taps]]:
            i, x = given
            it = iter(x)
            sliced = [self.slice_of(v, *kept[v], i) if v in kept else next(it) for v, _, _ in rest]
            outs, new = self.graph(body, [*ins[:consts], *state, *sliced])
            return tuple(outs[:carry]), (tuple(outs[carry:]), new)

        start = tuple(
            x if hasattr(x, "dtype") else jnp.asarray(x, v.dtype)
            for x, v in zip(ins[consts : consts + carry], body.ins[consts:], strict=False)
        )
        p: dict[str, Any] = {"length": op.trips, "reverse": False, "unroll": 1} | op.params
        end, (ys, new) = jax.lax.scan(
            step,
            start,
            (jnp.arange(p["length"], dtype=jnp.int32), tuple(x for v, _, x in rest if v not in kept)),
            length=p["length"],
            reverse=p["reverse"],
            unroll=p["unroll"],
        )
        return [*end, *ys], new

    def moved(self, inner: Val, outer: Operand, q: QuantizedTensor) -> bool:
        """Whether a scan slices a packed leaf otherwise than along the first axis of its arrays."""
        axis, left = self.scanned_here(inner, outer)
        view = self.views[outer]  # type: ignore[index]
        return view.extent(axis) != (0, view.shape[axis]) or "b" in q.live_axes[: left.index(axis)]

    def scanned_here(self, inner: Val, outer: Operand) -> tuple[int, list[int]]:
        """The leaf axis that one scan slices, and the leaf axes that are still there outside of it."""
        view = self.views[outer]  # type: ignore[index]
        (axis,) = (d for d in self.views[inner].scanned if d not in view.scanned)
        return axis, [d for d in range(len(view.shape)) if d not in view.scanned]

    def slice_of(self, inner: Val, outer: Operand, q: Value, i: jax.Array) -> QuantizedTensor:
        axis, left = self.scanned_here(inner, outer)
        assert isinstance(q, QuantizedTensor)
        view = self.views[outer]  # type: ignore[index]
        return packed.index_batch(q, left.index(axis), view.extent(axis)[0] + i)

    def cond(self, op: Op, ins: list[Value], enter: Enter, run: RunBody) -> tuple[list[ArrayLike], Taps]:
        values = ins[1:]
        shapes: Taps = {}
        if self.tap:
            for body in op.bodies:
                shapes |= jax.eval_shape(lambda *a, body=body: run(body, *a)[1], *enter(body, values))

        def branch(body: Graph, *a: Value) -> tuple[list[ArrayLike], Taps]:
            outs, new = run(body, *enter(body, list(a)))
            blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            return outs, {**blank, **new}

        return jax.lax.switch(ins[0], [lambda *a, body=body: branch(body, *a) for body in op.bodies], *values)


def _live(view: View, window: Window) -> Window:
    """What of ``window`` concerns axes that no loop has sliced away."""
    return tuple(w for d, w in enumerate(window) if d not in view.scanned)
