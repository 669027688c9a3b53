"""A traced program with its calls inlined: who computes a value, who reads it, in which loop body."""

from __future__ import annotations

import dataclasses
from typing import Any

from awq_jax.trace.jaxpr import Graph, Op, Operand, Params, Use, Val
from awq_jax.trace.uses import Program

OUTPUT = -1
"""Index that stands for "returned" among the readers of a value."""


@dataclasses.dataclass(eq=False)
class Node:
    """An operation whose operands are resolved through calls; ``bodies`` are inner scopes.

    ``unused``: nothing that the program returns depends on it.
    """

    index: int
    op: Op
    ins: list[Any]
    bodies: list[Scope]
    unused: bool = False

    @property
    def name(self) -> str:
        return self.op.name

    @property
    def outs(self) -> list[Val]:
        return self.op.outs

    @property
    def params(self) -> Params:
        return self.op.params

    @property
    def use(self) -> Use | None:
        return self.op.use

    @property
    def x(self) -> Val:
        """The activation of a matmul with a parameter."""
        return self.ins[self.op.x]

    def vals(self) -> list[Val]:
        return [v for v in self.ins if isinstance(v, Val)]


@dataclasses.dataclass(eq=False)
class Scope:
    """The whole program, or the body of a scan, while or cond.

    Attributes:
      nodes: operations in order.
      made_by: value -> (node, which of its results).
      readers: value -> (node index, operand position) of nodes that are used; `OUTPUT` if the scope returns it.
      derived: values computed from parameters and constants only.
      outer: the enclosing scope and the loop node there; None at the top.
    """

    graph: Graph
    outer: tuple[Scope, Node] | None
    nodes: list[Node] = dataclasses.field(default_factory=list)
    made_by: dict[Val, tuple[Node, int]] = dataclasses.field(default_factory=dict)
    readers: dict[Val, list[tuple[int, int]]] = dataclasses.field(default_factory=dict)
    derived: set[Val] = dataclasses.field(default_factory=set)
    outs: list[Any] = dataclasses.field(default_factory=list)

    def outside(self, v: Val) -> tuple[Scope, Val] | None:
        """The enclosing scope, and the value there that an input of this one, a body, is (or is a slice of)."""
        if self.outer is None or v not in self.graph.ins:
            return None
        scope, node = self.outer
        given = node.op.body_inputs(self.graph)[self.graph.ins.index(v)]
        found = next((a for a, b in zip(node.ins, node.op.ins, strict=True) if b is given), None)
        return (scope, found) if isinstance(found, Val) else None

    def given(self, v: Val) -> tuple[Scope, Operand] | None:
        """The enclosing scope, and what is given there for an input of this one, a body, that no iteration changes.

        Where a scan slices it, what is given is whole.
        """
        if self.outer is None or v not in self.graph.ins:
            return None
        scope, node = self.outer
        i = self.graph.ins.index(v)
        fixed, carried = node.op.fixed(self.graph)
        if fixed <= i < fixed + carried:
            return None
        operand = node.op.body_inputs(self.graph)[i]
        return scope, next((a for a, b in zip(node.ins, node.op.ins, strict=True) if b is operand), operand)

    def all(self) -> list[Scope]:
        """This scope and all inside it, outermost first."""
        return [self, *(s for n in self.nodes for b in n.bodies for s in b.all())]


def flatten(program: Program) -> Scope:
    """The scopes of a program."""
    top = _scope(program.graph, None, set(program.graph.ins[: len(program.leaves)]))
    _mark_unused(top, {v for v in top.outs if isinstance(v, Val)})
    return top


def _mark_unused(scope: Scope, live: set[Val]) -> None:
    """Find what ``live``, results of the scope, does not depend on.

    All results of a loop count as used if one of them is, but for what a scan stacks.
    """
    returned = frozenset(live)
    for node in reversed(scope.nodes):
        node.unused = not node.op.has_effects and not any(v in live for v in node.outs)
        for body in node.bodies:
            carried = node.op.fixed(body.graph)[1] if node.name == "scan" else len(body.outs)
            used = [v for i, v in enumerate(body.outs) if i < carried or node.outs[i] in live]
            _mark_unused(body, set() if node.unused else {v for v in used if isinstance(v, Val)})
        if not node.unused:
            live.update(node.vals())
    for v, readers in scope.readers.items():
        scope.readers[v] = [
            (i, pos) for i, pos in readers if (v in returned if i == OUTPUT else not scope.nodes[i].unused)
        ]


def _scope(graph: Graph, outer: tuple[Scope, Node] | None, derived: set[Val]) -> Scope:
    scope = Scope(graph, outer, derived=derived)
    known: dict[Val, Operand] = {}

    def resolve(v: Operand) -> Operand:
        return known.get(v, v) if isinstance(v, Val) else v

    def walk(graph: Graph) -> None:
        known.update(graph.consts)
        for op in graph.ops:
            ins = [resolve(v) for v in op.ins]
            if op.is_call:
                body = op.bodies[0]
                known.update(zip(body.ins, ins, strict=True))
                walk(body)
                known.update((o, resolve(v)) for o, v in zip(op.outs, body.outs, strict=True))
                continue
            node = Node(len(scope.nodes), op, ins, [])
            scope.nodes.append(node)
            for pos, v in enumerate(ins):
                if isinstance(v, Val):
                    scope.readers.setdefault(v, []).append((node.index, pos))
            if all(v in derived for v in node.vals()) and not op.bodies:
                derived.update(op.outs)
            scope.made_by.update((o, (node, k)) for k, o in enumerate(op.outs))
            for body in op.bodies:
                outer_of = dict(zip(body.ins, (resolve(v) for v in op.body_inputs(body)), strict=True))
                fixed, carry = op.fixed(body)
                inner = {
                    v
                    for i, (v, o) in enumerate(outer_of.items())
                    if isinstance(o, Val) and o in derived and not fixed <= i < fixed + carry
                }
                node.bodies.append(_scope(body, (scope, node), inner))

    walk(graph)
    scope.outs = [resolve(v) for v in graph.outs]
    for v in scope.outs:
        if isinstance(v, Val):
            scope.readers.setdefault(v, []).append((OUTPUT, OUTPUT))
    return scope
