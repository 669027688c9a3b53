"""Products with computed weights, as products with the parameters they are computed of.

Before the matmuls of a program are looked for, those whose weight is a tree of linear steps (`linear_steps`) are
replaced by the products with its leaves, and convolutions that are matmuls by these (`convolutions`). Nothing is packed
otherwise for it: a concatenation's parts are weights of their own, and a gain is multiplied into the activation or the
result when the model runs.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.trace import convolutions
from awq_jax.trace.grouped_calls import grouped
from awq_jax.trace.jaxpr import DRAWS, Graph, Op, Operand, Val, traced
from awq_jax.trace.linear_steps import LINEAR, REARRANGES, Gain, Leaf, Padded, Sum, Tree, leaves, operands, read

INLINED = frozenset(("jit", "pjit", "closed_call", "core_call"))
PARTS = REARRANGES | {"slice", "split", "unstack", "dynamic_slice", "gather", "squeeze"}


def distribute(graph: Graph, parameters: set[Val]) -> None:
    """Rewrite ``graph`` and all inside it; ``parameters``: those of its inputs that are parameters."""
    _Rewriter().graph(graph, parameters, parameters)


@dataclasses.dataclass
class _Rewriter:
    made_by: dict[Val, Op] = dataclasses.field(default_factory=dict)
    derived: set[Val] = dataclasses.field(default_factory=set)  # computed from parameters and constants alone
    weights: set[Val] = dataclasses.field(default_factory=set)  # parameters, and parts of one, rearranged
    same: dict[Val, Operand] = dataclasses.field(default_factory=dict)  # results of calls that are no longer there

    def graph(self, graph: Graph, derived: set[Val], weights: set[Val]) -> None:
        self.derived |= derived | set(graph.consts)
        self.weights |= weights
        todo, ops, taken_apart = deque(graph.ops), [], set[Val]()
        while todo:
            op = todo.popleft()
            op.ins = [self.known(v) for v in op.ins]
            if op.name in INLINED and self.worth_inlining(op):
                todo.extendleft(reversed(self.inlined(op)))
                continue
            new = self.rewritten(op)
            if new is not None:
                taken_apart |= {v for v in op.ins if isinstance(v, Val)}
                todo.extendleft(reversed(new))
                continue
            self.note(op)
            for body in op.bodies:
                self.enter(op, body)
            ops.append(op)
        graph.outs = [self.known(v) for v in graph.outs]
        graph.ops = self.without_unread(ops, graph.outs, taken_apart)

    def known(self, v: Operand) -> Operand:
        while isinstance(v, Val) and v in self.same:
            v = self.same[v]
        return v

    def note(self, op: Op) -> None:
        """Take down what the results of an operation are."""
        self.made_by.update((o, op) for o in op.outs)
        vals = [v for v in op.ins if isinstance(v, Val)]
        if not op.bodies and not op.has_effects and op.name not in DRAWS and all(v in self.derived for v in vals):
            self.derived.update(op.outs)
        if op.name in PARTS and vals and vals[0] in self.weights:
            self.weights.update(op.outs)

    def enter(self, op: Op, body: Graph) -> None:
        fixed, carry = op.fixed(body)
        pairs = [
            (inner, outer)
            for i, (outer, inner) in enumerate(zip(op.body_inputs(body), body.ins, strict=True))
            if not fixed <= i < fixed + carry
        ]
        derived = {inner for inner, outer in pairs if not isinstance(outer, Val) or outer in self.derived}
        self.graph(body, derived, {inner for inner, outer in pairs if isinstance(outer, Val) and outer in self.weights})

    def worth_inlining(self, op: Op) -> bool:
        """Whether a call computes a weight, or is given a computed one."""
        vals = [v for v in op.ins if isinstance(v, Val)]
        if op.has_effects or grouped(op) is not None or not any(v in self.derived for v in vals):
            return False
        return all(v in self.derived for v in vals) or any(self.computed(v) for v in vals)

    def computed(self, v: Val) -> bool:
        while v in self.derived and (op := self.made_by.get(v)) is not None:
            if op.name in LINEAR:
                return True
            if op.name not in REARRANGES or not isinstance(op.ins[0], Val):
                return False
            v = op.ins[0]
        return False

    def inlined(self, op: Op) -> list[Op]:
        body = op.bodies[0]
        self.same.update(zip(body.ins, op.ins, strict=True))
        self.same.update(body.consts)
        self.same.update(zip(op.outs, body.outs, strict=True))
        return body.ops

    def rewritten(self, op: Op) -> list[Op] | None:
        """The operations that take the place of ``op``; None if it stays."""
        if op.name not in ("dot_general", "conv_general_dilated") or op.is_typed_by_mesh:
            return None
        if op.name == "conv_general_dilated":
            fn = convolutions.as_matmul(op) if op.ins[1] in self.derived and op.ins[0] not in self.derived else None
            return None if fn is None else self.instead(op, op.ins, fn)
        for pos in (1, 0):
            other = op.ins[1 - pos]
            if not isinstance(op.ins[pos], Val) or op.ins[pos] not in self.derived or other in self.derived:
                continue
            tree = _settled(read(op.ins[pos], self.made_by, self.derived), op, pos)
            if isinstance(tree, Leaf) or not any(self.is_matrix(x.value) for x in leaves(tree)):
                continue
            vals = list(dict.fromkeys(x.value for x in operands(tree) if isinstance(x.value, Val)))

            def fn(x: jax.Array, *arrays: jax.Array, tree: Tree = tree, pos: int = pos, vals: Any = vals) -> jax.Array:
                y = _Product(op, pos, dict(zip(vals, arrays, strict=True))).of(tree, x)
                return y.astype(op.outs[0].dtype)

            return self.instead(op, [other, *vals], fn)
        return None

    def is_matrix(self, v: Operand) -> bool:
        return isinstance(v, Val) and v in self.weights and v.is_float and sum(n > 1 for n in v.shape) > 1

    def instead(self, op: Op, ins: Sequence[Operand], fn: Callable[..., jax.Array]) -> list[Op]:
        with jax.numpy_rank_promotion("allow"):
            graph = traced(op, fn, ins)
        self.same.update(zip(graph.ins, ins, strict=True))
        self.same.update(graph.consts)
        self.same[op.outs[0]] = graph.outs[0]
        return graph.ops

    def without_unread(self, ops: list[Op], outs: list[Any], apart: set[Val]) -> list[Op]:
        """``ops`` without those that only made what is multiplied otherwise now."""
        live = {v for v in outs if isinstance(v, Val)}
        kept = []
        for op in reversed(ops):
            if op.outs and not any(o in live for o in op.outs) and any(o in apart for o in op.outs):
                apart |= {v for v in op.ins if isinstance(v, Val)}
                continue
            live |= {v for v in op.ins if isinstance(v, Val)}
            kept.append(op)
        return kept[::-1]


def _settled(tree: Tree, op: Op, pos: int) -> Tree:
    """The tree with what cannot be moved behind the product left as the program computes it."""
    contract, batch = (set(dims[pos]) for dims in op.dims)
    if isinstance(tree, Leaf):
        return tree
    if isinstance(tree, Gain):
        varies = {d for d, n in enumerate(tree.by.shape) if n > 1}
        if varies & contract and varies - contract - batch:
            return tree.whole
        return dataclasses.replace(tree, part=_settled(tree.part, op, pos))
    if isinstance(tree, Padded):
        if any(tree.padding[d] != (0, 0) for d in batch):
            return tree.whole
        return dataclasses.replace(tree, part=_settled(tree.part, op, pos))
    return dataclasses.replace(tree, parts=tuple(_settled(part, op, pos) for part in tree.parts))


@dataclasses.dataclass(frozen=True)
class _Product:
    """``x`` times a tree, as ``op`` multiplies; ``pos``: of the weight among its operands."""

    op: Op
    pos: int
    env: dict[Val, jax.Array]

    @property
    def wide(self) -> Any:
        dtype: Any = self.op.outs[0].dtype
        return jnp.promote_types(dtype, jnp.float32)

    def of(self, tree: Tree, x: jax.Array) -> jax.Array:
        contract, batch = self.op.dims
        mine, other = contract[self.pos], contract[1 - self.pos]
        if isinstance(tree, Leaf):
            return self.dot(x, tree.read(self.env))
        if isinstance(tree, Sum):
            terms = [self.of(part, x).astype(self.wide) for part in tree.parts]
            return sum(sign * y for sign, y in zip(tree.signs[1:], terms[1:], strict=True)) + terms[0]
        if isinstance(tree, Gain):
            by = tree.by.read(self.env)
            if any(tree.by.shape[d] > 1 for d in mine):
                return self.of(tree.part, _times(x, self.along_activation(by, x.ndim), tree.over))
            return _times(self.of(tree.part, x), self.along_result(by, x.ndim), tree.over)
        if isinstance(tree, Padded):
            y = self.of(tree.part, self.unpadded(x, tree))
            ends = [(0, 0)] * y.ndim
            for d, n in enumerate(tree.padding):
                if d not in mine and d not in batch[self.pos]:
                    ends[self.result_axis(d, x.ndim)] = n
            return jnp.pad(y, ends)
        sizes = [(p.shape if isinstance(p, Leaf) else p.whole.shape)[tree.axis] for p in tree.parts]
        bounds = np.cumsum(sizes)[:-1].tolist()
        if tree.axis in mine:
            pieces = jnp.split(x, bounds, axis=other[tuple(mine).index(tree.axis)])
            terms = [self.of(part, piece).astype(self.wide) for part, piece in zip(tree.parts, pieces, strict=True)]
            return sum(terms[1:], terms[0])
        pieces = [x] * len(sizes)
        if tree.axis in batch[self.pos]:
            at = tuple(batch[self.pos]).index(tree.axis)
            pieces = jnp.split(x, bounds, axis=batch[1 - self.pos][at])
        parts = [self.of(part, piece) for part, piece in zip(tree.parts, pieces, strict=True)]
        return jnp.concatenate(parts, self.result_axis(tree.axis, x.ndim))

    def dot(self, x: jax.Array, w: jax.Array) -> jax.Array:
        p = self.op.params
        lhs, rhs = (x, w) if self.pos == 1 else (w, x)
        kind = p.get("preferred_element_type") or self.op.outs[0].dtype
        return jax.lax.dot_general(lhs, rhs, self.op.dims, p["precision"], kind)

    def result_axis(self, d: int, rank: int) -> int:
        """Where the weight's axis ``d`` is in the result; ``rank``: of the activation."""
        contract, batch = self.op.dims
        if d in batch[self.pos]:
            return tuple(batch[self.pos]).index(d)
        all_axes = range(len(self.op.ins[self.pos].shape))
        free = [a for a in all_axes if a not in contract[self.pos] and a not in batch[self.pos]]
        others = rank - len(contract[0]) - len(batch[0])
        return len(batch[0]) + (others if self.pos == 1 else 0) + free.index(d)

    def along_activation(self, by: jax.Array, rank: int) -> jax.Array:
        contract, batch = self.op.dims
        pairs = [*zip(contract[self.pos], contract[1 - self.pos], strict=True)]
        pairs += zip(batch[self.pos], batch[1 - self.pos], strict=True)
        return _placed(by, dict(pairs), rank)

    def along_result(self, by: jax.Array, rank: int) -> jax.Array:
        kept = [d for d in range(by.ndim) if d not in self.op.dims[0][self.pos]]
        out = len(self.op.outs[0].shape)
        return _placed(by, {d: self.result_axis(d, rank) for d in kept}, out)

    def unpadded(self, x: jax.Array, tree: Padded) -> jax.Array:
        contract, _ = self.op.dims
        window = [slice(None)] * x.ndim
        for d, e in zip(contract[self.pos], contract[1 - self.pos], strict=True):
            low, high = tree.padding[d]
            window[e] = slice(low, x.shape[e] - high)
        return x[tuple(window)]


def _placed(by: jax.Array, places: dict[int, int], rank: int) -> jax.Array:
    """``by`` with its axes where ``places`` says, the others of size 1."""
    order = sorted(places, key=places.__getitem__)
    shape = [1] * rank
    for d in order:
        shape[places[d]] = by.shape[d]
    rest = [d for d in range(by.ndim) if d not in places]  # of size 1
    return jnp.transpose(by, [*rest, *order]).reshape(shape)


def _times(a: jax.Array, by: jax.Array, over: bool) -> jax.Array:
    by = by.astype(a.dtype)
    return a / by if over else a * by
