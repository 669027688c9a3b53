"""A jaxpr as plain objects: the only file that touches jaxprs, so the only one a JAX release can break."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.sharding import AxisType
from jax.typing import ArrayLike, DTypeLike

from awq_jax.trace.views import AxisRoles, Window

Params = dict[str, Any]  # of a primitive: each has its own
DRAWS = frozenset(("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"))
REMAT = frozenset(("remat2", "remat", "checkpoint"))
CALLS = REMAT | frozenset(
    ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
)


@dataclasses.dataclass(eq=False)
class Val:
    """A value of the program."""

    shape: tuple[int, ...]
    dtype: DTypeLike | None  # None where it is no array

    @property
    def is_float(self) -> bool:
        """Whether it is an array of floats."""
        return self.dtype is not None and jnp.issubdtype(self.dtype, jnp.floating)

    @property
    def is_whole(self) -> bool:
        """Whether it is an array of whole numbers or flags."""
        kinds = (jnp.integer, jnp.bool_)
        return self.dtype is not None and any(jnp.issubdtype(self.dtype, kind) for kind in kinds)


Operand = Val | ArrayLike  # a literal is the array or number itself


@dataclasses.dataclass(frozen=True)
class Use:
    """One matmul of the traced program with a parameter leaf.

    Attributes:
      index: position among the program's uses.
      path: the weight's parameter path.
      axes: roles of the leaf's axes as in `plan.Site`, "" if they cannot be named.
      reason: why the leaf cannot be quantized for this matmul, "" if it can.
      loops: one letter per enclosing scan, outermost first: ``s`` if it slices the leaf, ``r`` if
        every iteration reads the same leaf. `interpret.run` stacks taps along one leading axis each.
      scanned: the leaf axes that those loops slice, outermost loop first.
      part: what the matmul reads of the leaf, as `views.View.window`; () for all of it.
      experts: if each row meets the weight of its own expert, what identifies the experts chosen; else None.
      split: each device has only some of its rows or experts.
    """

    index: int
    path: str
    axes: str
    reason: str = ""
    loops: str = ""
    scanned: tuple[int, ...] = ()
    part: Window = ()
    experts: Hashable | None = None
    split: bool = False


@dataclasses.dataclass(eq=False)
class Op:
    """One operation.

    Attributes:
      name: primitive name.
      ins: `Val`, or a literal array.
      outs: results.
      eqn: the jaxpr equation.
      bodies: sub-graphs of a call, scan, while (condition, body) or cond (branches).
      within: name of the innermost jitted function it was called in ("silu"), "" if none.
      use: set if it is a matmul with a parameter.
      weight: position of that parameter in ``ins``.
      roles: how the matmul reads it, None if its axes cannot be named.
      grouped: the operands, if each row of the activation meets the weight of an expert.
      trips: of a while loop, how often it runs, if its counter alone decides that.
    """

    name: str
    ins: list[Any]
    outs: list[Val]
    eqn: jex.JaxprEqn
    bodies: list[Graph]
    within: str = ""
    use: Use | None = None
    weight: int = 1
    roles: AxisRoles | None = None
    grouped: Grouped | None = None
    trips: int | None = None

    @property
    def params(self) -> Params:
        return self.eqn.params

    @property
    def has_effects(self) -> bool:
        """Whether it does more than compute its results, as prints and callbacks do."""
        return bool(self.eqn.effects)

    @property
    def is_call(self) -> bool:
        """Whether its body is a part of the program around it: values inside have the shapes they have outside."""
        if self.name == "shard_map":
            body = self.bodies[0]
            inside = [v.shape for v in (*body.ins, *body.outs) if isinstance(v, Val)]
            outside = [np.shape(v) for v in self.ins]
            outside += [o.shape for o, v in zip(self.outs, body.outs, strict=True) if isinstance(v, Val)]
            return inside == outside
        return self.name in CALLS and self.grouped is None

    @property
    def result_sharding(self) -> Any:
        """Of its first result; with Explicit axes of a mesh it is a part of the type."""
        return getattr(self.eqn.outvars[0].aval, "sharding", None)

    @property
    def is_typed_by_mesh(self) -> bool:
        """Whether an operand or a result lies on a mesh with Explicit axes, which then are a part of its type."""
        shardings = (getattr(v.aval, "sharding", None) for v in (*self.eqn.invars, *self.eqn.outvars))
        return any(
            any(axis is not None for axis in getattr(s, "spec", ()))
            and any(kind == AxisType.Explicit for kind in getattr(s.mesh, "axis_types", ()))
            for s in shardings
            if s is not None
        )

    @property
    def x(self) -> int:
        """Position of the activation of a matmul with a parameter."""
        return 1 - self.weight if self.grouped is None else self.grouped.x

    @property
    def dims(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """``dimension_numbers`` of a matmul, by position of the operand: contracted axes, batch axes."""
        if self.grouped is not None:
            return self.grouped.contract, ((), ())
        return self.params["dimension_numbers"]

    def describe(self) -> str:
        """For messages: the function it belongs to, and the line of the user's code it came from."""
        name, line = self.within, ""
        for frame in getattr(self.eqn.source_info.traceback, "frames", ()):
            file, function = frame.file_name.replace("\\", "/"), frame.function_name.split(".")[-1]
            if not name and file.endswith("jax/_src/nn/functions.py") and function[0] not in "_<":
                name = function
            if not line and "-packages/" not in file and not file.startswith("<"):
                line = f" ({file.split('/')[-1]}:{frame.line_num})"
        return (name or self.name) + line

    def body_inputs(self, body: Graph) -> list[Operand]:
        """The operands that become ``body.ins``, in order (a scan's still stacked)."""
        if self.name == "cond":
            return self.ins[1:]
        if self.name == "while":
            a, b = self.params["cond_nconsts"], self.params["body_nconsts"]
            carry = self.ins[a + b :]
            return [*self.ins[:a], *carry] if body is self.bodies[0] else [*self.ins[a : a + b], *carry]
        return self.ins

    def fixed(self, body: Graph) -> tuple[int, int]:
        """How many leading body inputs every iteration sees unchanged, and how many are carried."""
        if self.name == "scan":
            return scan_split(self.params)
        if self.name == "while":
            fixed = self.params["cond_nconsts" if body is self.bodies[0] else "body_nconsts"]
            return fixed, len(body.ins) - fixed
        return len(body.ins), 0


class Grouped(NamedTuple):
    """How an operation multiplies rows that are sorted by expert, each with its expert's weight.

    Attributes:
      x, weight, sizes: positions of the rows, of the weights, and of how many rows each expert has.
      contract: contracted axes of the rows and of the weight, in the same order.
      group: the weight's axis of experts.
    """

    x: int
    weight: int
    sizes: int
    contract: tuple[tuple[int, ...], tuple[int, ...]]
    group: int


@dataclasses.dataclass(eq=False)
class Graph:
    """Operations in order. ``watched``: some matmul with a parameter is inside."""

    ins: list[Val]
    outs: list[Any]
    ops: list[Op]
    consts: dict[Val, Any]
    watched: bool = False

    def draws(self) -> bool:
        """Whether any operation inside draws random numbers."""
        return any(op.name in DRAWS or any(body.draws() for body in op.bodies) for op in self.ops)


def _sub_jaxprs(name: str, params: Params) -> list[jex.Jaxpr | jex.ClosedJaxpr]:
    if name in CALLS:
        return [next(params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params)]
    if name in ("scan", "shard_map"):
        return [params["jaxpr"]]
    if name == "while":
        return [params["cond_jaxpr"], params["body_jaxpr"]]
    return list(params["branches"]) if name == "cond" else []


def scan_split(params: Params) -> tuple[int, int]:
    """Numbers of constants and of carried values of a scan."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def build(jaxpr: jex.Jaxpr | jex.ClosedJaxpr, within: str) -> Graph:
    """The operations of a jaxpr; ``within``: the jitted function they belong to."""
    consts = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    env = {v: Val(tuple(v.aval.shape), v.aval.dtype) for v in (*jaxpr.constvars, *jaxpr.invars)}

    def read(v: jex.Var | jex.Literal) -> Operand:
        return v.val if isinstance(v, jex.Literal) else env[v]

    ops = []
    for eqn in jaxpr.eqns:
        outs = [Val(tuple(getattr(v.aval, "shape", ())), getattr(v.aval, "dtype", None)) for v in eqn.outvars]
        name = eqn.primitive.name
        called = str(eqn.params.get("name", "")) if name in CALLS else ""
        inner = called if called and called[0] not in "_<" else within
        bodies = [build(j, inner) for j in _sub_jaxprs(name, eqn.params)]
        ops.append(Op(name, [read(v) for v in eqn.invars], outs, eqn, bodies, within))
        env.update(zip(eqn.outvars, outs, strict=True))
    captured = {env[v]: c for v, c in zip(jaxpr.constvars, consts, strict=True)}
    return Graph([env[v] for v in jaxpr.invars], [read(v) for v in jaxpr.outvars], ops, captured)


def traced(op: Op, fn: Callable[..., jax.Array], ins: Sequence[Operand]) -> Graph:
    """The operations of ``fn(*ins)``, to stand for ``op``: with its place in the user's code."""
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) if isinstance(v, Val) else v for v in ins]
    graph = build(jax.make_jaxpr(fn)(*shapes), op.within)

    def mark(graph: Graph) -> None:
        for new in graph.ops:
            new.eqn = new.eqn.replace(source_info=op.eqn.source_info, ctx=op.eqn.ctx)
            new.within = op.within
            for body in new.bodies:
                mark(body)

    mark(graph)
    return graph


def bind(op: Op, ins: Sequence[ArrayLike]) -> list[jax.Array]:
    """Apply the operation's own primitive."""
    prim = op.eqn.primitive
    params = prim.get_bind_params(op.params)
    with op.eqn.ctx.manager:
        out = prim.bind(*ins, **params)
    return list(out) if prim.multiple_results else [out]
