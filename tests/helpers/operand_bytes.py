"""Which parameters the products of a program read, by a walk of its jaxpr that knows nothing of plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from awq_jax.paths import flatten

PRODUCTS = ("dot_general", "ragged_dot_general", "ragged_dot", "conv_general_dilated")
Source = tuple[frozenset[str], bool]  # parameters it is computed of, and whether of these and constants alone


def parameters_of_products(fn: Callable[..., Any], params: Any, *args: Any) -> dict[str, int]:
    """Path -> bytes of every float matrix that an operand of a product is computed of, with nothing else in it."""
    named = flatten(params)
    leaves, tree = jax.tree.flatten(params)
    closed = jax.make_jaxpr(lambda leaves, args: fn(jax.tree.unflatten(tree, leaves), *args))(leaves, args)
    used: set[str] = set()
    none: Source = (frozenset(), False)
    rest = len(closed.jaxpr.invars) - len(leaves)
    _walk(closed.jaxpr, [*((frozenset([p]), True) for p in named), *[none] * rest], used)

    def matrix(x: Any) -> bool:
        return sum(n > 1 for n in np.shape(x)) > 1 and jax.numpy.issubdtype(x.dtype, jax.numpy.floating)

    return {p: math.prod(x.shape) * x.dtype.itemsize for p, x in named.items() if p in used and matrix(x)}


def _walk(jaxpr: Any, ins: Sequence[Source], used: set[str]) -> list[Source]:
    env: dict[Any, Source] = dict(zip(jaxpr.invars, ins, strict=True))
    env |= {v: (frozenset(), True) for v in jaxpr.constvars}

    def of(v: Any) -> Source:
        return (frozenset(), True) if hasattr(v, "val") else env[v]

    for eqn in jaxpr.eqns:
        given = [of(v) for v in eqn.invars]
        name, p = eqn.primitive.name, eqn.params
        if name in PRODUCTS:
            used |= {path for paths, alone in given[:2] if alone for path in paths}
        bodies = [getattr(x, "jaxpr", x) for v in p.values() for x in (v if isinstance(v, tuple | list) else (v,))]
        bodies = [b for b in bodies if hasattr(b, "eqns")]
        outs = None
        for body in bodies:
            inner = _given(name, p, given, body)
            found = _walk(body, inner, used) if len(inner) == len(body.invars) else None
            outs = found if outs is None or name != "cond" else outs
        if outs is None or len(outs) != len(eqn.outvars) or name in ("scan", "while", "cond"):
            paths = frozenset(path for one, _ in given for path in one)
            outs = [(paths, all(alone for _, alone in given))] * len(eqn.outvars)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [of(v) for v in jaxpr.outvars]


def _given(name: str, p: dict[str, Any], given: list[Source], body: Any) -> list[Source]:
    """The sources of a body's inputs; what a loop carries is computed."""
    if name == "cond":
        return given[1:]
    if name == "while":
        a, b = p["cond_nconsts"], p["body_nconsts"]
        fixed = given[:a] if body is getattr(p["cond_jaxpr"], "jaxpr", None) else given[a : a + b]
        return [*fixed, *((frozenset(), False) for _ in given[a + b :])]
    if name == "scan" and "num_consts" in p:
        c, k = p["num_consts"], p["num_carry"]
        return [*given[:c], *((frozenset(), False) for _ in range(k)), *given[c + k :]]
    return given
