"""Experts that rows choose: statistics of each, routers left float, products with packed experts."""

from __future__ import annotations

import expert_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant_helpers import dense
from user_models import E, F

import awq_jax
from awq_jax.calibration import by_expert
from awq_jax.calibration.calibration import batch_sums
from awq_jax.plan.discover import discover


def rms(x, w):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w


@pytest.mark.parametrize("form", expert_models.FORMS)
def test_experts_are_calibrated_packed_and_multiplied_one_by_one(form):
    case = expert_models.case(form)
    calib = awq_jax.calibrate(case.fn, case.params, case.args and [case.args], progress=False)
    p = {k: np.asarray(v, np.float64) for k, v in case.params.items()}
    h = rms(case.args[0].reshape(-1, p["norm"].size).astype(np.float64), p["norm"])
    top = np.argsort(-(h @ p["router"]), axis=-1)[:, : 1 if form in ("one_hot", "vmapped") else expert_models.TOP]
    for e in range(E):
        rows = h[(top == e).any(-1)]
        gate = rows @ p["gate"][e]
        hidden = gate / (1 + np.exp(-gate)) * (rows @ p["up"][e])
        for name, x in (("gate", rows), ("down", hidden)):
            stats = calib.stats[name]
            assert stats.count[e] == len(rows)
            np.testing.assert_allclose(stats.gram[e], x.T @ x, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(stats.abs[e], np.abs(x).sum(0), rtol=1e-4, atol=1e-4)
    q = awq_jax.quantize(
        case.params, calib, group_size=16, n_grid=2, method="awq", on_indivisible="pad", progress=False
    )
    packed = {k for k, v in q.items() if isinstance(v, awq_jax.QuantizedTensor)}
    assert packed == {"gate", "up", "down"}
    got, want = awq_jax.bind(case.fn)(q, *case.args), case.fn(dense(q), *case.args)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    wide = str(jax.make_jaxpr(awq_jax.bind(case.fn))(q, *case.args))
    assert f"f32[{E},{p['norm'].size},{F}]" not in wide, "all experts are dequantized"


def test_rows_without_an_expert_belong_to_none():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(50, 8)), jnp.float32).at[3].set(jnp.nan).at[4].set(0)
    expert = jnp.asarray(rng.integers(-1, 3, 50), jnp.int32)
    got = by_expert.sums(x, expert, 3)
    for e in range(3):
        want = batch_sums(x[np.asarray(expert) == e])
        for a, b in zip(got, (want.gram, want.abs, want.count, want.dropped), strict=True):
            np.testing.assert_allclose(a[e], b, rtol=1e-5, atol=1e-5)

    def short(p, x):  # three rows are no expert's: their results are zero
        return jax.lax.ragged_dot(jnp.tanh(x), p["w"], jnp.array([5, 0, 8], jnp.int32)) @ p["head"]

    p = {"w": jnp.asarray(rng.normal(size=(3, 16, 16)), jnp.float32), "head": jnp.eye(16)}
    x = jnp.asarray(rng.normal(size=(16, 16)), jnp.float32)
    q = awq_jax.quantize(p, [x], apply_fn=short, group_size=16, method="rtn", progress=False)
    y = awq_jax.bind(short)(q, x)
    np.testing.assert_allclose(y, short(dense(q), x), rtol=1e-4, atol=1e-5)
    assert not np.any(np.asarray(y)[13:])


def test_what_only_chooses_is_a_router():
    def fn(p, x):
        best, _ = jax.lax.approx_max_k(x @ p["approx"], 1)
        order = jnp.argsort(x @ p["sorted"], axis=-1)[:, :1]
        inner = jax.lax.cond(x.sum() > 0, lambda s: jnp.argmax(s, -1), lambda s: jnp.argmin(s, -1), x @ p["branch"])
        called = jax.pure_callback(lambda s: s, jax.ShapeDtypeStruct((4, 2), jnp.float32), x @ p["opaque"])
        h = jnp.tanh(x @ p["plain"])
        return (h * best * order * inner[:, None] * called[:, :1]) @ p["last"]

    names = {"approx": 4, "sorted": 4, "branch": 4, "opaque": 2, "plain": 16, "last": 16}
    p = {k: jax.ShapeDtypeStruct((16, n), jnp.float32) for k, n in names.items()}
    plan = discover(fn, p, jax.ShapeDtypeStruct((4, 16), jnp.float32))
    assert {s.path for _, s in plan.sites() if s.router} == {"approx", "sorted", "branch", "opaque"}


def test_a_kernel_known_by_name_is_a_site():
    """Megablox' grouped matmul, traced only: it runs on TPUs. A square weight's axes are read off the kernel."""
    gmm = pytest.importorskip("jax.experimental.pallas.ops.tpu.megablox").gmm

    def fn(p, x, sizes):
        y = jnp.tanh(gmm(x, p["up"], sizes, jnp.float32))
        return gmm(jnp.tanh(gmm(y, p["square"], sizes, jnp.float32, transpose_rhs=True)), p["down"], sizes) @ p["head"]

    shapes = {"up": (2, 128, 256), "square": (2, 256, 256), "down": (2, 256, 128), "head": (128, 128)}
    p = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    plan = discover(fn, p, jax.ShapeDtypeStruct((256, 128), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32))
    assert {s.path: s.axes for _, s in plan.sites()} == {"up": "bkn", "square": "bnk", "down": "bkn", "head": "kn"}


def test_megablox_is_quantized_and_served():
    """Interpreted on a CPU for the float model; NumPy multiplies each row by the packed weight of its expert."""
    gmm = pytest.importorskip("jax.experimental.pallas.ops.tpu.megablox").gmm
    rng = np.random.default_rng(0)
    shapes = {"up": (2, 32, 64), "down": (2, 32, 64), "router": (32, 2), "head": (32, 32)}
    p = {k: jnp.asarray(rng.normal(size=s) / 6, jnp.float32) for k, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(128, 32)) * np.exp(rng.normal(size=32)), jnp.float32)
    p["norm"] = jnp.ones(32)
    asked = (jnp.float32, (128, 32, 32), None, None)

    def fn(p, x):
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["norm"]
        expert = jnp.argmax(x @ p["router"], -1)
        order, sizes = jnp.argsort(expert), jnp.bincount(expert, length=2).astype(jnp.int32)
        up = jnp.tanh(gmm(x[order], p["up"], sizes, *asked, False, True))
        return gmm(up, p["down"], sizes, *asked, True, True)[jnp.argsort(order)] @ p["head"]

    calib = awq_jax.calibrate(fn, p, [x], progress=False)
    assert {s.path: s.axes for _, s in calib.plan.sites() if "b" in s.axes} == {"up": "bkn", "down": "bnk"}
    q = awq_jax.quantize(p, calib, group_size=32, method="awq", n_grid=4, progress=False)
    assert {k for k, v in q.items() if isinstance(v, awq_jax.QuantizedTensor)} == {"up", "down"}
    d = {k: np.asarray(v, np.float64) for k, v in dense(q).items()}
    h = rms(np.asarray(x, np.float64), d["norm"])
    expert = (h @ d["router"]).argmax(-1)
    want = np.stack([np.tanh(row @ d["up"][e]) @ d["down"][e].T for row, e in zip(h, expert, strict=True)]) @ d["head"]
    np.testing.assert_allclose(awq_jax.bind(fn)(q, x), want, rtol=1e-4, atol=1e-5)


def test_a_known_kernel_with_more_operands_is_none():
    """Of megablox: a product that is added to what is there."""
    gmm = pytest.importorskip("jax.experimental.pallas.ops.tpu.megablox").gmm

    def fn(p, x, sizes):
        return gmm(x, p["w"], sizes, jnp.float32, (128, 32, 32), None, jnp.ones((128, 32)), False, True) @ p["head"]

    p = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in {"w": (2, 32, 32), "head": (32, 32)}.items()}
    x = jax.ShapeDtypeStruct((128, 32), jnp.float32)
    plan = discover(fn, p, x, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert {s.path for _, s in plan.sites()} == {"head"}
    assert plan.skipped["w"] == "it is read by pallas_call"


@pytest.mark.parametrize(("before", "first"), [(0, 0), (2, 2), (2, 0)])
def test_rows_padded_to_tiles_and_cut_again_are_scaled_as_without(before, first):
    """As MaxText's kernels have it, which pad anew for each weight; not where rows then meet another expert."""

    def padded(x, w, sizes):
        x = jax.lax.pad(x, jnp.array(0.0, x.dtype), [(before, 16 - before, 0), (0, 0, 0)])
        return jax.lax.ragged_dot(x, w, sizes)[first : first + 48]

    def fn(p, x, dot):
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["norm"]
        e = jnp.argmax(x @ p["router"], -1)
        order, sizes = jnp.argsort(e), jnp.bincount(e, length=4).astype(jnp.int32)
        h = x[order]
        y = jax.nn.silu(dot(h, p["gate"], sizes)) * dot(h, p["up"], sizes)
        return jnp.tanh(dot(y, p["down"], sizes)[jnp.argsort(order)]) @ p["head"]

    rng = np.random.default_rng(0)
    shapes = {"gate": (4, 16, 32), "up": (4, 16, 32), "down": (4, 32, 16), "router": (16, 4), "head": (16, 16)}
    p = {k: jnp.asarray(rng.normal(size=s) / 4, jnp.float32) for k, s in shapes.items()} | {"norm": jnp.ones(16)}
    x = jnp.asarray(rng.normal(size=(48, 16)), jnp.float32)
    plain = discover(lambda p, x: fn(p, x, jax.lax.ragged_dot), p, x)
    plan = discover(lambda p, x: fn(p, x, padded), p, x)

    def sites(plan):
        return {tuple(s.path for s in g.sites): [a.path for a in g.absorbers] for g in plan.groups}

    moved = {"down": [], "head": []} if before or first else {}
    expected = {k: moved.get(k[0], v) for k, v in sites(plain).items()}
    assert sites(plan) == expected
    assert sites(plain)["down",] == ["up"]
    if not moved:
        checked = awq_jax.calibrate(lambda p, x: fn(p, x, padded), p, [x], progress=False).plan
        assert sites(checked) == expected, "a group that moves the output has no absorbers any more"
