"""Models with `shard_map` inside or around them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from quant_helpers import dense
from stacked_models import norm
from user_models import D, E, F, V, _params

import awq_jax
from awq_jax.plan.discover import discover

MESH = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Auto,))
X = np.random.default_rng(0).normal(size=(64, D)).astype(np.float32)


def inner(p, x, wrap):
    """Experts within a shard_map: MaxText's default. Routing is within, the router's matmul outside."""
    h = norm(x, p["norm"])

    def local(h, logits, w):
        weight, which = jax.lax.top_k(jax.nn.softmax(logits), 1)
        order = jax.numpy.argsort(which[:, 0])
        sizes = jax.numpy.bincount(which[:, 0], length=E)
        a = jax.nn.silu(jax.lax.ragged_dot(h[order], w["up"], sizes))
        return jax.lax.ragged_dot(a, w["down"], sizes)[jax.numpy.argsort(order)] * weight

    f = jax.shard_map(local, mesh=MESH, in_specs=(P("rows"), P("rows"), P()), out_specs=P("rows")) if wrap else local
    return jax.numpy.tanh(f(h, h @ p["router"], {k: p[k] for k in ("up", "down")})) @ p["head"]


def whole(p, x, wrap):
    """A model wholly inside."""

    def f(p, x):
        return (x + jax.nn.relu(norm(x, p["norm"]) @ p["up"][0]) @ p["down"][0]) @ p["head"]

    return (jax.shard_map(f, mesh=MESH, in_specs=(P(), P("rows")), out_specs=P("rows")) if wrap else f)(p, x)


@pytest.mark.parametrize("fn", [inner, whole])
def test_shard_map_changes_nothing(fn):
    shapes = {"norm": (D,), "router": (D, E), "up": (E, D, F), "down": (E, F, D), "head": (D, V)}
    shapes |= {} if fn is inner else {"up": (1, D, F), "down": (1, F, D)}
    p = _params(**shapes)
    (plain, mapped) = (lambda p, x, wrap=wrap: fn(p, x, wrap) for wrap in (False, True))
    want, got = (awq_jax.calibrate(f, p, [X], progress=False) for f in (plain, mapped))
    assert [dataclasses.asdict(s) for _, s in got.plan.sites()] == [dataclasses.asdict(s) for _, s in want.plan.sites()]
    assert [[a.path for a in g.absorbers] for g in got.plan.groups] == [
        [a.path for a in g.absorbers] for g in want.plan.groups
    ]
    assert {s.path for _, s in got.plan.sites() if s.router} == ({"router"} if fn is inner else set())
    for name, stats in want.stats.items():
        for a, b in zip(jax.tree.leaves(got.stats[name]), jax.tree.leaves(stats), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    q = awq_jax.quantize(p, got, group_size=16, method="rtn", on_indivisible="pad", progress=False)
    assert {k for k, v in q.items() if isinstance(v, awq_jax.QuantizedTensor)} == {"up", "down"}
    np.testing.assert_allclose(awq_jax.bind(mapped)(q, X), plain(dense(q), X), rtol=1e-4, atol=1e-4)


def test_no_matmul_without_a_line():
    """Every matrix that reaches a product, whatever was done to it before, is a site or has a reason."""

    def fn(p, x):
        qkv = x @ jax.numpy.concatenate([p["q"], p["kv"]], 1)
        h = jax.nn.silu(qkv @ (p["up"] * p["gain"][:, None]))
        h = h @ (p["w"] / jax.numpy.linalg.norm(p["w"], axis=0)) @ (p["base"] + p["a"] @ p["b"])
        return jax.numpy.tanh(h @ p["down"]) @ p["head"]

    sizes = {"q": (8, 8), "kv": (8, 16), "up": (24, 8), "gain": (24,), "w": (8, 8), "base": (8, 8)}
    sizes |= {"a": (8, 2), "b": (2, 8), "down": (8, 8), "head": (8, 8)}
    p = {k: jax.ShapeDtypeStruct(s, np.float32) for k, s in sizes.items()}
    plan = discover(fn, p, jax.ShapeDtypeStruct((4, 8), np.float32))
    lines = {s.path for _, s in plan.sites()} | set(plan.skipped)
    assert lines == set(p) - {"gain"}
    assert set(plan.skipped) == {"w", "a", "b"}
    assert "mul" in plan.skipped["w"], "its norm is computed of it"


def test_a_mesh_with_explicit_axes():
    """The default of `jax.make_mesh`: shardings are types, and every contraction would have to name one."""
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Explicit,))

    def fn(p, x):
        return jax.nn.relu(norm(x, p["norm"]) @ p["up"]) @ p["down"]

    p = _params(norm=(D,), up=(D, 32), down=(32, D))
    options = {"group_size": 16, "method": "awq", "n_grid": 2, "quantize_head": True, "progress": False}
    want = awq_jax.calibrate(fn, p, [X], include_head=True, progress=False)
    packed = awq_jax.quantize(p, want, **options)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.NamedSharding(mesh, P("rows", None)))
        split = {"norm": P(), "up": P(None, "rows"), "down": P(None, None)}
        there = {k: jax.device_put(v, jax.NamedSharding(mesh, split[k])) for k, v in p.items()}
        got = awq_jax.calibrate(lambda p, x: fn({**p, "up": jax.sharding.reshard(p["up"], P())}, x), there, [x],
                                include_head=True, progress=False)  # fmt: skip
        for a, b in zip(jax.tree.leaves(dict(got.stats)), jax.tree.leaves(dict(want.stats)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        q = awq_jax.quantize(there, got, **options)
        for k in ("up", "down"):
            np.testing.assert_array_equal(q[k].qweight, packed[k].qweight)
        y = awq_jax.bind(fn)(jax.device_put(q, jax.NamedSharding(mesh, P())), x)
        assert y.sharding.spec[0] == "rows"
    np.testing.assert_allclose(y, fn(dense(packed), X), rtol=1e-4, atol=1e-4)
