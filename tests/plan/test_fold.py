"""Evaluation, taps, folding and verification on the models of the zoo."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import user_models
import zoo

from awq_jax import pack, paths
from awq_jax.errors import PlanError, ShapeError, WeightError
from awq_jax.plan import fold
from awq_jax.plan.discover import discover
from awq_jax.plan.plan import Absorber, Plan, ScaleGroup, Site
from awq_jax.plan.verify import _culprits, verify
from awq_jax.qtensor import QuantizedTensor, split_shape
from awq_jax.trace import interpret


@functools.cache
def jitted(name: str) -> Any:
    case = zoo.MODELS[name]()
    return jax.jit(lambda params: case.fn(params, *case.args))


@functools.cache
def plan_of(name: str) -> Plan:
    case = zoo.MODELS[name]()
    return discover(case.fn, case.params, *case.args)


def distance(a: Any, b: Any) -> float:
    """Largest difference relative to the largest value, over all outputs."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max() / np.abs(np.asarray(x)).max()) for x, y in pairs)


def random_scales(plan: Plan, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out = {}
    for g in plan.groups:
        if g.absorbers:
            s = np.exp(0.5 * rng.normal(size=(*g.scan, math.prod(g.batch) * g.channels)))
            s = s if g.shared_channels is None else s[..., g.shared_channels]
            out[g.name] = s.reshape(*g.scan, *g.batch, g.channels).astype(np.float32)
    return out


# ---------------------------------------------------------------------------- fold


def half(plan: Plan, params: Any, scales: Any, **gone: Any) -> Any:
    """Folded into a plan whose groups have lost their sites or absorbers."""
    folder = fold.Folder(Plan(tuple(dataclasses.replace(g, **gone) for g in plan.groups)), scales)
    return paths.map_with_path(folder.leaf, params)


def scale_sites(plan: Plan, params: Any, scales: Any) -> Any:
    taken = {g.name: fold.followed(g, scales[g.follows.group]) for g in plan.groups if g.follows}
    return half(plan, params, scales | taken, absorbers=(), follows=None)


def divide_absorbers(plan: Plan, params: Any, scales: Any) -> Any:
    return half(plan, params, scales, sites=())


@pytest.mark.parametrize("name", zoo.MODELS)
def test_folding_random_scales_keeps_the_output(name: str) -> None:
    case, plan = zoo.MODELS[name](), plan_of(name)
    scales = random_scales(plan)
    before = jitted(name)(case.params)
    folded = fold.apply(plan, case.params, scales)
    assert list(paths.flatten(folded)) == list(paths.flatten(case.params))
    assert distance(before, jitted(name)(folded)) < 1e-5
    if scales:  # and each half alone does not
        assert distance(before, jitted(name)(scale_sites(plan, case.params, scales))) > 1e-2
        halves = divide_absorbers(plan, scale_sites(plan, case.params, scales), scales)
        for a, b in zip(jax.tree.leaves(halves), jax.tree.leaves(folded), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_fold_arithmetic_against_numpy() -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)  # scanned, n, k, k
    a = rng.normal(size=(2, 6)).astype(np.float32)
    index = np.array([3, -1, 0, 19, 19, 7], np.int32)
    group = ScaleGroup("w", (Site("w", "snkk", w.shape),), 20, (Absorber("a", index, 1.0),), None, (2,))
    s = rng.uniform(0.5, 2, (2, 20)).astype(np.float32)
    out = fold.apply(Plan((group,)), {"w": w, "a": a, "other": a}, {"w": s})
    np.testing.assert_allclose(out["w"], w * s.reshape(2, 1, 5, 4), rtol=1e-6)
    expected = a.copy()
    for layer in range(2):
        for i, c in enumerate(index):
            if c >= 0:
                expected[layer, i] = (1 + a[layer, i]) / s[layer, c] - 1
    np.testing.assert_allclose(out["a"], expected, rtol=1e-5, atol=1e-6)
    assert out["other"] is a


def test_fold_experts_with_shared_and_own_scales() -> None:
    w = np.arange(24, dtype=np.float32).reshape(2, 4, 3) + 1
    own = ScaleGroup("w", (Site("w", "bkn", w.shape),), 4, (), None, (), (2,))
    shared = dataclasses.replace(own, batch=())
    s = np.random.default_rng(0).uniform(1, 2, (2, 4)).astype(np.float32)
    np.testing.assert_allclose(scale_sites(Plan((own,)), {"w": w}, {"w": s})["w"], w * s[:, :, None], rtol=1e-6)
    one = scale_sites(Plan((shared,)), {"w": w}, {"w": s[0]})["w"]
    np.testing.assert_allclose(one, w * s[0][None, :, None], rtol=1e-6)


def test_fold_keeps_dtype_and_rounds_once() -> None:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.bfloat16)
    group = ScaleGroup("w", (Site("w", "kn", (4, 4)),), 4, (Absorber("w", np.arange(4, dtype=np.int32)[None]),))
    s = np.array([0.3, 1.7, 0.9, 3.1], np.float32)
    out = fold.apply(Plan((group,)), {"w": w}, {"w": s})["w"]
    assert out.dtype == jnp.bfloat16
    exact = np.asarray(w, np.float32) * s[:, None] / s[None]
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, rtol=2**-8)


def test_fold_refusals() -> None:
    case, plan = zoo.MODELS["cached_decode"](), plan_of("cached_decode")
    ones = np.ones(user_models.D, np.float32)
    with pytest.raises(PlanError, match=r"group o cannot absorb a scale: .*the model.s input"):
        fold.apply(plan, case.params, {"o": ones})
    with pytest.raises(PlanError, match="no such group"):
        fold.apply(plan, case.params, {"p": ones})
    with pytest.raises(ShapeError, match=r"scale of q: shape \(3,\), expected \(16,\)"):
        fold.apply(plan, case.params, {"q": ones[:3]})
    packed = case.params | {"q": packed_like(case.params["q"], "kn", np.random.default_rng(0))}
    with pytest.raises(WeightError, match="q is packed"):
        fold.apply(plan, packed, {"q": ones})


# ---------------------------------------------------------------------------- evaluate


def packed_like(w: Any, axes: str, rng: np.random.Generator, bits: int = 4) -> QuantizedTensor:
    """Random codes of the shape of ``w``, worth about as much as its own entries."""
    axes = axes.replace("s", "b")
    b, k, n = split_shape(w.shape, axes)
    kk, nn = math.prod(k), math.prod(n)
    codes = jnp.asarray(rng.integers(0, 2**bits, (*b, kk, nn)), jnp.uint8)
    scales = jnp.asarray(rng.uniform(0.5, 1.5, (*b, kk // 8, nn)) * float(jnp.std(w)) / 5, jnp.float32)
    zeros = jnp.asarray(rng.integers(0, 2**bits, (*b, kk // 8, nn)), jnp.uint8)
    return QuantizedTensor(pack.pack(codes, bits), scales, zeros, None, bits, 8, axes, k, n, "float32")


@pytest.mark.parametrize("name", zoo.MODELS)
def test_evaluate_is_the_function(name: str) -> None:
    case = zoo.MODELS[name]()
    program = interpret.trace(case.fn, case.params, *case.args)
    # Nothing packed, nothing tapped: every operation is applied as it was traced.
    same = jax.jit(lambda p: interpret.run(program, p, *case.args))(case.params)
    assert distance(jitted(name)(case.params), same) < 1e-6


@pytest.mark.parametrize(
    "name", ["linen_scan_remat", "linen_gemma", "moe_einsum", "shared_loop", "while_loop", "cached_decode"]
)
def test_evaluate_with_packed_leaves(name: str) -> None:
    case = zoo.MODELS[name]()
    program = interpret.trace(case.fn, case.params, *case.args)
    axes = {u.path: u.axes for u in program.uses}
    rng = np.random.default_rng(0)
    packed = paths.map_with_path(lambda p, w: packed_like(w, axes[p], rng) if p in axes else w, case.params)
    unpacked = paths.map_with_path(lambda p, w: w.dequantize() if p in axes else w, packed)
    seen = set()

    def matmul(x: jax.Array, q: QuantizedTensor) -> jax.Array:
        assert x.ndim == len(q.batch) + 2
        seen.add((q.live_axes, q.k, q.n))
        return jnp.einsum("...tk,...kn->...tn", x, q.dequantize_canonical())

    @jax.jit
    def run(packed: Any) -> Any:
        inside = interpret.trace(case.fn, packed, *case.args)  # under jit, from the packed tree
        return (
            interpret.run(program, packed, *case.args, matmul=matmul),
            interpret.run(inside, packed, *case.args),
        )

    expected = jitted(name)(unpacked)
    for out in run(packed):
        assert distance(expected, out) < 2e-5
    leaves = paths.flatten(packed)
    assert seen == {(axes[p].lstrip("s"), leaves[p].k, leaves[p].n) for p in axes}


def test_taps_see_what_the_layers_saw() -> None:
    """Against Flax's own record of the modules' outputs."""
    case = zoo.MODELS["linen_unrolled"]()
    program = interpret.trace(case.fn, case.params, *case.args)
    out, taps = jax.jit(lambda p: interpret.run(program, p, *case.args, tap=lambda use, x: x))(case.params)
    assert distance(jitted("linen_unrolled")(case.params), out) < 1e-6
    by_path = {u.path: taps[u.index] for u in program.uses}
    _, state = user_models.LinenLM().apply(
        case.params, *case.args, capture_intermediates=True, mutable=["intermediates"]
    )
    layer = state["intermediates"]["layer1"]
    (norm,) = layer["norm1"]["__call__"]
    np.testing.assert_allclose(by_path["params/layer1/k/kernel"], norm.reshape(-1, user_models.D), rtol=1e-5, atol=1e-6)
    gate, up = layer["gate"]["__call__"][0], layer["up"]["__call__"][0]
    hidden = np.asarray(jax.nn.silu(gate) * up).reshape(-1, user_models.F)
    np.testing.assert_allclose(by_path["params/layer1/down/kernel"], hidden, rtol=1e-4, atol=1e-5)


def test_tap_of_many_contracted_axes_is_in_the_order_of_the_leaf() -> None:
    case = zoo.MODELS["linen_gemma"]()
    program = interpret.trace(case.fn, case.params, *case.args)
    _, taps = jax.jit(lambda p: interpret.run(program, p, *case.args, tap=lambda use, x: x))(case.params)
    (x,) = [taps[u.index] for u in program.uses if u.path == "params/o/kernel"]
    _, state = user_models.GemmaLM().apply(
        case.params, *case.args, capture_intermediates=True, mutable=["intermediates"]
    )
    (y,) = state["intermediates"]["o"]["__call__"]
    w = np.asarray(case.params["params"]["o"]["kernel"]).reshape(-1, user_models.D)
    np.testing.assert_allclose(np.asarray(x) @ w, y.reshape(-1, user_models.D), rtol=1e-4, atol=1e-5)


def test_taps_of_scanned_and_shared_layers_are_stacked() -> None:
    case = zoo.MODELS["nnx_scan"]()
    p = {k: np.asarray(v, np.float64) for k, v in paths.flatten(case.params).items()}
    program = interpret.trace(case.fn, case.params, *case.args)
    _, taps = jax.jit(lambda p: interpret.run(program, p, *case.args, tap=lambda use, x: x))(case.params)
    (use,) = [u for u in program.uses if u.path == "layers/down/kernel"]
    assert use.loops == "s"
    x = p["embed/embedding"][case.args[0]]
    for i in range(user_models.L):
        h = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["layers/norm/scale"][i]
        hidden = np.maximum(h @ p["layers/up/kernel"][i] + p["layers/up/bias"][i], 0)
        np.testing.assert_allclose(taps[use.index][i], hidden.reshape(-1, user_models.F), rtol=1e-4, atol=1e-5)
        x = x + hidden @ p["layers/down/kernel"][i] + p["layers/down/bias"][i]

    case = zoo.MODELS["shared_loop"]()
    program = interpret.trace(case.fn, case.params, *case.args)
    (use,) = [u for u in program.uses if u.path == "down"]
    assert use.loops == "r"
    _, taps = interpret.run(program, case.params, *case.args, tap=lambda use, x: x.sum())
    assert taps[use.index].shape == (3,)


def test_tap_of_experts_keeps_their_axis() -> None:
    case = zoo.MODELS["moe_einsum"]()
    p = {k: np.asarray(v, np.float64) for k, v in case.params.items()}
    program = interpret.trace(case.fn, case.params, *case.args)
    _, taps = interpret.run(program, case.params, *case.args, tap=lambda use, x: x)
    by_path = {u.path: taps[u.index] for u in program.uses}
    x = p["embed"][case.args[0]].reshape(-1, user_models.D)
    h = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["norm"]
    np.testing.assert_allclose(by_path["gate"], h, rtol=1e-4, atol=1e-5)
    for e in range(user_models.E):
        gate = h @ p["gate"][e]
        hidden = gate / (1 + np.exp(-gate)) * (h @ p["up"][e])
        np.testing.assert_allclose(by_path["down"][e], hidden, rtol=1e-4, atol=1e-5)


def test_branches_remat_and_flags() -> None:
    def fn(p: Any, x: jax.Array, deterministic: bool, *, mode: str) -> Any:
        y = jax.checkpoint(lambda x: jnp.tanh(x @ p["a"]))(x)
        y = jax.lax.cond(y.sum() > 0, lambda y: y @ p["b"], lambda y: y @ p["c"].T, y)
        return {"y": y if mode == "plain" else -y, "none": None}

    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=(8, 8)), jnp.float32) for n in "abc"}
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    program = interpret.trace(fn, params, x, True, mode="plain")
    out, taps = interpret.run(program, params, x, True, mode="plain", tap=lambda use, x: (x * x).sum())
    hidden = np.tanh(np.asarray(x) @ np.asarray(params["a"]))
    weight = params["b"] if hidden.sum() > 0 else params["c"].T
    np.testing.assert_allclose(out["y"], hidden @ np.asarray(weight), rtol=1e-5, atol=1e-5)
    by_path = {u.path: float(taps[u.index]) for u in program.uses}
    taken, left = ("b", "c") if hidden.sum() > 0 else ("c", "b")
    assert by_path[taken] == pytest.approx((hidden**2).sum(), rel=1e-5)
    assert by_path[left] == 0

    packed = params | {"a": packed_like(params["a"], "kn", rng), "c": packed_like(params["c"], "nk", rng)}
    floats = {n: w.dequantize() if isinstance(w, QuantizedTensor) else w for n, w in packed.items()}

    def loss(x: jax.Array) -> jax.Array:
        def matmul(x: jax.Array, q: QuantizedTensor) -> jax.Array:
            return x @ q.dequantize_canonical()

        return interpret.run(program, packed, x, True, mode="plain", matmul=matmul)["y"].sum()

    expected = jax.grad(lambda x: fn(floats, x, True, mode="plain")["y"].sum())(x)
    np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-4, atol=1e-5)

    with pytest.raises(ShapeError, match="not an array changed"):
        interpret.run(program, params, x, False, mode="plain")
    with pytest.raises(ShapeError, match=r"shape \(5, 8\) was traced with \(4, 8\)"):
        interpret.run(program, params, jnp.ones((5, 8)), True, mode="plain")
    with pytest.raises(ShapeError, match=r"b: traced with shape \(8, 8\), called with None"):
        interpret.run(program, {"a": params["a"], "c": params["c"]}, x, True, mode="plain")


def test_untapped_scan_stays_one_scan() -> None:
    case = zoo.MODELS["linen_scan_remat"]()
    program = interpret.trace(case.fn, case.params, *case.args)
    jaxpr = jax.make_jaxpr(lambda p: interpret.run(program, p, *case.args))(case.params)
    original = jax.make_jaxpr(lambda p: case.fn(p, *case.args))(case.params)
    assert [e.primitive.name for e in jaxpr.eqns] == [e.primitive.name for e in original.eqns]


# ---------------------------------------------------------------------------- verify


def swap(plan: Plan, name: str, **changes: Any) -> Plan:
    assert any(g.name == name for g in plan.groups)
    groups = (dataclasses.replace(g, **changes) if g.name == name else g for g in plan.groups)
    return Plan(tuple(groups), plan.skipped)


@pytest.mark.parametrize("name", ["linen_unrolled", "nnx_scan", "moe_einsum", "fused_splits"])
def test_right_plans_pass(name: str) -> None:
    case, plan = zoo.MODELS[name](), plan_of(name)
    assert verify(plan, case.fn, case.params, *case.args).to_dict() == plan.to_dict()


def test_wrong_groups_lose_their_absorbers_and_others_keep_them() -> None:
    case, plan = zoo.MODELS["linen_unrolled"](), plan_of("linen_unrolled")
    right = plan.groups[0].absorbers[0]
    bad = swap(plan, "params/layer1/o/kernel", shared_channels=None)  # query heads no longer tied
    reverse = np.arange(user_models.D, dtype=np.int32)[::-1].copy()
    bad = swap(bad, "params/layer0/q/kernel", absorbers=(dataclasses.replace(right, index=reverse),))
    wrong = {"params/layer1/o/kernel", "params/layer0/q/kernel"}
    for g in verify(bad, case.fn, case.params, *case.args).groups:
        assert bool(g.absorbers) == (g.name not in wrong)
        assert ("moved the output by" in g.reason) == (g.name in wrong)


def test_groups_wrong_only_together_are_all_refused() -> None:
    groups = [ScaleGroup(n, (), 1) for n in "abcdefgh"]
    asked = []

    def moved(some: list[ScaleGroup]) -> float:
        asked.append(len(some))
        return 0.5 if {"c", "d"} <= {g.name for g in some} else 0.0

    assert _culprits(groups, moved, 1e-4) == {"c": 0.5, "d": 0.5}
    assert asked == [8, 4, 2, 2, 1, 1, 4]


def test_sixteen_bit_models_and_offsets() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        h = user_models._norm(x.astype(jnp.float32), 1 + p["n"].astype(jnp.float32)).astype(jnp.bfloat16)
        return jax.nn.relu(h @ p["up"]) @ p["down"]

    rng = np.random.default_rng(0)
    shapes = {"n": (16,), "up": (16, 24), "down": (24, 8)}
    params = {n: jnp.asarray(rng.normal(size=s), jnp.bfloat16) for n, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(4, 16)), jnp.bfloat16)
    plan = discover(fn, params, x)
    assert [g.reason for g in verify(plan, fn, params, x).groups] == ["", ""]
    bad = swap(plan, "up", absorbers=(dataclasses.replace(plan.groups[0].absorbers[0], offset=0.0),))
    assert ["moved" in g.reason for g in verify(bad, fn, params, x).groups] == [True, False]


def test_verify_needs_something_to_compare() -> None:
    case, plan = zoo.MODELS["moe_einsum"](), plan_of("moe_einsum")
    with pytest.raises(PlanError, match="abstract"):
        verify(plan, case.fn, case.params, jax.ShapeDtypeStruct((2, 5), jnp.int32))
    with pytest.raises(PlanError, match="float outputs"):
        verify(plan, lambda p, t: case.fn(p, t).argmax(-1), case.params, *case.args)
    with pytest.raises(PlanError, match="no down"):
        verify(plan, case.fn, {k: v for k, v in case.params.items() if k != "down"}, *case.args)
