"""Matmuls whose rows each meet the weight of an expert: `jax.lax.ragged_dot`, and kernels that are known by name.

Such a kernel is not looked into. Its operands are told by their shapes: rows [M, K], weights [E, K, N] or
[E, N, K], and how many rows each expert has, [E]. Another array is one that the product is added to, so it is none
of these. Only a number may stand beside them, of the first expert there is: 0, as every expert has a size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.extend import core as jex

from awq_jax.trace.jaxpr import Grouped, Op, Val

# (name of the function, part of the path of its source file)
KERNELS = (
    ("gmm", "megablox/gmm.py"),  # jax.experimental.pallas.ops.tpu.megablox, and MaxText's copy of it
    ("gmm", "megablox/ops.py"),
    ("gmm", "kernels/megablox"),
    ("ragged_dot", "tokamax/"),
    ("_ragged_dot", "tokamax/"),
)


def grouped(op: Op) -> Grouped | None:
    """What ``op`` is as such a matmul; None if it is none, or another than rows times weights."""
    if op.name in ("ragged_dot_general", "ragged_dot"):
        dims = op.params.get("ragged_dot_dimension_numbers")
        if dims is None or op.params.get("group_offset") is not None:
            return None
        (lhs, rhs), (batch, _) = dims.dot_dimension_numbers
        ragged, groups = tuple(dims.lhs_ragged_dimensions), tuple(dims.rhs_group_dimensions)
        rows = set(range(len(op.ins[0].shape))) - set(lhs)
        if batch or len(groups) != 1 or rows != set(ragged) or len(ragged) != 1:
            return None
        return Grouped(0, 1, 2, (tuple(lhs), tuple(rhs)), groups[0])
    if not op.is_call or len(op.outs) != 1:
        return None
    name, file = _source(op)
    if not any(name == known and part in file for known, part in KERNELS):
        return None
    vals = [(i, v) for i, v in enumerate(op.ins) if isinstance(v, Val)]
    lhs_at = next((i for i, v in vals if len(v.shape) == 2 and v.is_float), None)
    weight = next((i for i, v in vals if len(v.shape) == 3 and v.is_float), None)
    if lhs_at is None or weight is None or sum(math.prod(v.shape) > 1 or v.is_float for _, v in vals) != 3:
        return None
    (m, k), (e, a, b), out = op.ins[lhs_at].shape, op.ins[weight].shape, op.outs[0].shape
    sizes = next(
        (i for i, v in vals if v.shape == (e,) and v.dtype is not None and jnp.issubdtype(v.dtype, jnp.integer)), None
    )
    fits = [d for d, (x, n) in {1: (a, b), 2: (b, a)}.items() if x == k and out == (m, n)]
    if sizes is None or not fits:
        return None
    contracted = fits[0] if len(fits) == 1 else _contracted(op)
    return None if contracted is None else Grouped(lhs_at, weight, sizes, ((1,), (contracted,)), 0)


def _source(op: Op) -> tuple[str, str]:
    """Name and file of the function that a call calls."""
    for key in ("call_jaxpr", "jaxpr", "fun_jaxpr"):
        inner = op.params.get(key)
        info = getattr(getattr(inner, "jaxpr", inner), "debug_info", None)
        if info is not None:
            name, _, file = str(info.func_src_info).partition(" at ")
            return name.split(".")[-1], file.replace("\\", "/")
    return "", ""


def _contracted(op: Op) -> int | None:
    """Of a square weight the axis that is contracted, by the product within the kernel."""
    for eqn in _equations(op.params):
        if eqn.primitive.name == "dot_general":
            (_, rhs), _ = eqn.params["dimension_numbers"]
            return 1 + rhs[0] if len(getattr(eqn.invars[1].aval, "shape", ())) == 2 and len(rhs) == 1 else None
    return None


def _equations(params: dict[str, Any]) -> Iterator[jex.JaxprEqn]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            for eqn in getattr(getattr(one, "jaxpr", one), "eqns", ()):
                yield eqn
                yield from _equations(eqn.params)
