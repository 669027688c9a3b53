"""Discovery: which matmuls share an input, what absorbs its scale, and why not."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import user_models
import zoo

from awq_jax.errors import PlanError
from awq_jax.plan.discover import discover
from awq_jax.plan.plan import Absorber, Plan, ScaleGroup
from awq_jax.plan.validate import validate


def plan_of(name: str) -> Plan:
    case = zoo.MODELS[name]()
    return discover(case.fn, case.params, *case.args)


def group_of(plan: Plan, site: str) -> ScaleGroup:
    return next(g for g, s in plan.sites() if s.path == site)


def spec(**shapes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_groups_absorbers_and_reasons(name: str) -> None:
    case, plan = zoo.MODELS[name](), plan_of(name)
    found = {" ".join(sorted(s.name for s in g.sites)): g for g in plan.groups}
    expected = {" ".join(sorted(re.split(r"(?<![:,]) ", sites))): what for sites, what in case.groups.items()}
    assert sorted(found) == sorted(expected)
    for sites, what in expected.items():
        g = found[sites]
        if what.startswith("!"):
            assert not g.absorbers
            assert what[1:] in g.reason
            assert g.reason
        elif what.startswith("="):
            assert g.follows is not None
            assert g.follows.group == what[1:]
        else:
            assert sorted(a.path for a in g.absorbers) == sorted(what.split())
            assert g.reason == ""
    assert set(plan.skipped) == set(case.skipped)
    for path, why in case.skipped.items():
        assert why in plan.skipped[path]
    validate(plan, case.params)


def test_axes_of_every_kind_of_leaf() -> None:
    axes: dict[str, str] = {}
    for name in ("linen_scan_remat", "linen_gemma", "moe_einsum"):
        axes |= {s.path: s.axes for _, s in plan_of(name).sites()}
    assert axes["params/layers/q/kernel"] == "skn"
    assert axes["params/q/kernel"] == "knn"  # DenseGeneral to (heads, head size)
    assert axes["params/o/kernel"] == "kkn"
    assert axes["gate"] == "nkn"  # every expert reads the same input
    assert axes["down"] == "bkn"  # each its own
    assert axes["head"] == "nk"


def test_scan_and_batch_sizes() -> None:
    g = group_of(plan_of("linen_scan_remat"), "params/layers/down/kernel")
    assert (g.scan, g.batch, g.channels) == ((user_models.L,), (), user_models.F)
    g = group_of(plan_of("moe_einsum"), "down")
    assert (g.scan, g.batch, g.channels) == ((), (user_models.E,), user_models.F)
    assert g.absorbers[0].index.shape == (user_models.E, 1, user_models.F)
    np.testing.assert_array_equal(g.absorbers[0].index.ravel(), np.arange(user_models.E * user_models.F))


@pytest.mark.parametrize(
    ("model", "site"),
    [
        ("linen_unrolled", "params/layer1/o/kernel"),  # jnp.repeat
        ("linen_scan_remat", "params/layers/o/kernel"),  # grouped einsum
        ("linen_gemma", "params/o/kernel"),  # jax.nn.dot_product_attention
    ],
)
def test_query_heads_of_one_value_head_share_scales(model: str, site: str) -> None:
    g = group_of(plan_of(model), site)
    head, dim = np.divmod(np.arange(user_models.H * user_models.HD), user_models.HD)
    value_channel = head // (user_models.H // user_models.KV) * user_models.HD + dim
    assert g.shared_channels is not None
    np.testing.assert_array_equal(
        g.shared_channels[:, None] == g.shared_channels, value_channel[:, None] == value_channel
    )
    kernel = next(a for a in g.absorbers if a.path.endswith("v/kernel"))
    # Column c of v is divided by the scale of a channel that reads it.
    np.testing.assert_array_equal(value_channel[kernel.index.ravel()], np.arange(user_models.KV * user_models.HD))


def test_channels_are_free_elsewhere() -> None:
    for g in plan_of("nnx_unrolled").groups:
        assert g.shared_channels is None


def test_fused_projection_is_divided_in_its_value_part_only() -> None:
    g = group_of(plan_of("fused_splits"), "o")
    n = user_models.H * user_models.HD
    expected = np.concatenate([np.full(2 * n, -1), np.arange(n)])
    for a in g.absorbers:
        np.testing.assert_array_equal(a.index.ravel(), expected)


def test_offset_of_norms_stored_less_one() -> None:
    plan = plan_of("linen_gemma")
    assert [a.offset for a in group_of(plan, "params/q/kernel").absorbers] == [1.0]
    assert [a.offset for a in group_of(plan, "params/down/kernel").absorbers] == [0.0, 0.0]


def test_an_offset_does_not_cross_a_sign() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        return (jnp.tanh(x) * (1 + (-p["n"]))) @ p["b"]

    plan = discover(fn, spec(n=(8,), b=(8, 8)), jax.ShapeDtypeStruct((4, 8), jnp.float32))
    assert group_of(plan, "b").absorbers == ()
    assert "offset" in group_of(plan, "b").reason


def test_head_is_the_last_matmul_only() -> None:
    assert [s.path for _, s in plan_of("linen_unrolled").sites() if s.head] == ["params/head/kernel"]
    assert [s.path for _, s in plan_of("moe_einsum").sites() if s.head] == ["head"]


def test_plan_survives_json_and_is_the_same_twice() -> None:
    for name in ("linen_gemma", "moe_einsum", "linen_scan_remat"):
        plan = plan_of(name)
        text = json.dumps(plan.to_dict())
        again = Plan.from_dict(json.loads(text))
        assert json.dumps(again.to_dict()) == text
        for a, b in zip(plan.groups, again.groups, strict=True):
            for x, y in zip(a.absorbers, b.absorbers, strict=True):
                np.testing.assert_array_equal(x.index, y.index)
        assert json.dumps(plan_of(name).to_dict()) == text
        assert "absorb" in str(plan)


def test_large_abstract_model_needs_no_weights() -> None:
    d, heads, kv, hd, f, layers = 4096, 32, 8, 128, 14336, 32

    def fn(p: Any, x: jax.Array) -> jax.Array:
        for w in p["layers"]:
            h = user_models._norm(x, w["n1"])
            b, t, _ = x.shape
            q, k, v = ((h @ w[n]).reshape(b, t, -1, hd) for n in "qkv")
            x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, t, -1) @ w["o"]
            h = user_models._norm(x, w["n2"])
            x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
        return user_models._norm(x, p["n"]) @ p["head"]

    layer = spec(
        n1=(d,), q=(d, heads * hd), k=(d, kv * hd), v=(d, kv * hd), o=(heads * hd, d),
        n2=(d,), gate=(d, f), up=(d, f), down=(f, d),
    )  # fmt: skip
    params = {"layers": [layer] * layers, **spec(n=(d,), head=(d, 128256))}
    plan = discover(fn, params, jax.ShapeDtypeStruct((8, 2048, d), jnp.bfloat16))
    assert len(plan.groups) == 4 * layers + 1
    assert all(g.absorbers for g in plan.groups)
    # An index array of the size of a weight would be 59 million entries.
    assert max(a.index.size for g in plan.groups for a in g.absorbers) == f


def test_weight_read_by_two_inputs_has_a_group_of_its_own() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        h = user_models._norm(x, p["n1"])
        y = jnp.tanh(h @ p["w"] + h @ p["q"])
        return user_models._norm(y, p["n2"]) @ p["w"]

    plan = discover(fn, spec(n1=(8,), w=(8, 8), q=(8, 8), n2=(8,)), jax.ShapeDtypeStruct((4, 8), jnp.float32))
    g = group_of(plan, "w")
    assert [s.path for s in g.sites] == ["w"]
    assert "2 matmuls with different inputs share" in g.reason
    # n1 cannot absorb for q alone: the shared weight reads the same value.
    assert "the matmul with w" in group_of(plan, "q").reason


def test_one_activation_contracted_in_two_ways_makes_two_groups() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(x)
        a = jnp.einsum("thd,hdn->tn", x, p["a"]) + x.reshape(5, 16) @ p["same"]
        return a + jnp.einsum("thd,dhn->tn", x, p["other_order"]) + jnp.einsum("thd,hn->tn", x @ p["heads"], p["o"])

    shapes = spec(a=(4, 4, 8), same=(16, 8), other_order=(4, 4, 8), heads=(4, 4), o=(4, 8))
    plan = discover(fn, shapes, jax.ShapeDtypeStruct((5, 4, 4), jnp.float32))
    together = [{s.path for s in g.sites} for g in plan.groups]
    assert {"a", "same"} in together
    assert {"other_order"} in together

    def mixer(p: Any, x: jax.Array) -> jax.Array:
        return ((x := jnp.tanh(x)) @ p["channels"]) * (x.T @ p["tokens"]) @ p["o"]

    shapes = spec(channels=(8, 8), tokens=(8, 8), o=(8, 8))
    plan = discover(mixer, shapes, jax.ShapeDtypeStruct((8, 8), jnp.float32))
    assert [[s.path for s in g.sites] for g in plan.groups] == [["channels"], ["tokens"], ["o"]]


def test_unusable_weights_are_named() -> None:
    def fn(p: Any, x: jax.Array, ids: jax.Array) -> jax.Array:
        y = jax.nn.one_hot(ids, 6) @ p["embed"] + x @ p["stack"][0] + x @ p["stack"][1]
        y = y + (y @ p["vector"])[:, None] + y @ p["both"] + y @ p["both"].T
        return y @ p["ints"].astype(jnp.float32) + y @ p["good"]

    params = spec(embed=(6, 8), stack=(2, 8, 8), vector=(8,), both=(8, 8), good=(8, 8))
    params["ints"] = jax.ShapeDtypeStruct((8, 8), jnp.int8)
    x, ids = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    plan = discover(fn, params, x, ids)
    assert [s.name for _, s in plan.sites()] == ["stack[0]", "stack[1]", "good"]
    expected = {
        "embed": "looks rows up",
        "vector": "it is a vector",
        "both": "different axes",
        "ints": "int8",
    }
    assert plan.skipped.keys() == expected.keys()
    assert all(part in plan.skipped[path] for path, part in expected.items())


def test_leaky_activations_and_signs() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        y = jax.nn.leaky_relu(x @ p["up"] + p["bias"]) @ p["down"]
        return y + jnp.where(y > 1.0, jax.nn.relu6(x @ p["up6"]) @ p["down6"], 0.0)

    params = spec(up=(8, 12), bias=(12,), down=(12, 8), up6=(8, 12), down6=(12, 8))
    plan = discover(fn, params, jax.ShapeDtypeStruct((4, 8), jnp.float32))
    assert [a.path for a in group_of(plan, "down").absorbers] == ["bias", "up"]
    assert "relu6" in group_of(plan, "down6").reason  # clipping at 6 is not homogeneous


def test_scalar_parameters_and_gates_are_passed_over() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        h = user_models._norm(x, p["norm"]) * p["scalar"]
        y = (h @ p["value"]) * jax.nn.sigmoid(h @ p["gate"])
        return y @ p["out"]

    params = spec(norm=(8,), scalar=(), value=(8, 12), gate=(8, 12), out=(12, 8))
    plan = discover(fn, params, jax.ShapeDtypeStruct((4, 8), jnp.float32))
    assert {g.name: [a.path for a in g.absorbers] for g in plan.groups} == {"value": ["norm"], "out": ["value"]}


def test_no_matmul_is_an_error() -> None:
    w = jnp.ones((4, 4))
    with pytest.raises(PlanError, match="first argument"):
        discover(lambda p, x: x @ w + p["b"], spec(b=(4,)), jnp.ones((2, 4)))


# -------------------------------------------------------------------------------- validate


def edit(plan: Plan, i: int, **changes: Any) -> Plan:
    groups = list(plan.groups)
    groups[i] = dataclasses.replace(groups[i], **changes)
    return Plan(tuple(groups), plan.skipped)


def test_validate_names_the_path() -> None:
    case, plan = zoo.MODELS["moe_einsum"](), plan_of("moe_einsum")
    down = plan.groups[1]
    (up,) = down.absorbers
    site = down.sites[0]
    replace = dataclasses.replace
    wrong = {
        "no downs": edit(plan, 1, sites=(replace(site, path="downs"),)),
        r"down has shape \(3, 24, 16\)": edit(plan, 1, sites=(replace(site, shape=(3, 24, 17)),)),
        "axes 'bk' do not describe down": edit(plan, 1, sites=(replace(site, axes="bk"),)),
        "axes 'ksn' do not scan over|has scanned axes": edit(plan, 1, sites=(replace(site, axes="ksn"),)),
        "down contracts 24 channels, the group has 25": edit(plan, 1, channels=25),
        "batch axes": edit(plan, 1, batch=(4,)),
        "no ups": edit(plan, 1, absorbers=(replace(up, path="ups"),)),
        "absorber up: index 72 is out of range": edit(plan, 1, absorbers=(replace(up, index=up.index + 1),)),
        "does not fit absorber up": edit(plan, 1, absorbers=(Absorber("up", np.zeros((3, 24), np.int32)),)),
        "shared_channels has shape": edit(plan, 1, shared_channels=np.zeros(24, np.int32)),
        "two groups are called down": Plan((*plan.groups, down)),
        "site of two groups": Plan((*plan.groups, replace(down, name="again"))),
        "no site": edit(plan, 1, sites=()),
    }
    for message, bad in wrong.items():
        with pytest.raises(PlanError, match=message):
            validate(bad, case.params)


def test_one_row_cut_out_of_a_fused_projection_carries_its_own_scale():
    """q, k and v of one matrix, side by side for each head: only the values' columns absorb."""

    def fn(p, x):
        y = (x @ p["qkv"]).reshape(-1, 2, 3, 4)
        q, k, v = y[:, :, 0], y[:, :, 1], y[:, :, 2]
        weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k))
        return jnp.einsum("hts,shd->thd", weights, v).reshape(-1, 8) @ p["o"]

    p = {"qkv": np.ones((6, 24), np.float32), "o": np.ones((8, 5), np.float32)}
    group = next(g for g in discover(fn, p, np.ones((3, 6), np.float32)).groups if g.name == "o")
    index = np.full((2, 3, 4), -1)
    index[:, 2] = np.arange(8).reshape(2, 4)
    np.testing.assert_array_equal(group.absorbers[0].index, index.reshape(1, 24))
    assert group.shared_channels is None


def test_a_mask_of_zeros_ties_no_channels():
    def fn(p, x, keep):
        h = jnp.where(keep[:, None], jax.nn.silu(x @ p["gate"]) * (x @ p["up"]), 0)
        return jnp.where(h > 1, h, jnp.zeros_like(h)) @ p["down"], jnp.where(keep[:, None], x @ p["up2"], 1.0) @ p["b"]

    p = {k: np.ones((6, 6), np.float32) for k in ("gate", "up", "down", "up2", "b")}
    groups = {g.name: g for g in discover(fn, p, np.ones((3, 6), np.float32), np.ones(3, bool)).groups}
    assert not groups["down"].absorbers  # which rows are kept depends on the scale
    assert not groups["b"].absorbers  # a one is not scaled with the rest

    def masked(p, x, keep):
        return jnp.where(keep[:, None], jax.nn.silu(x @ p["gate"]) * (x @ p["up"]), 0) @ p["down"]

    group = next(
        g for g in discover(masked, p, np.ones((3, 6), np.float32), np.ones(3, bool)).groups if g.name == "down"
    )
    assert [a.path for a in group.absorbers] == ["up"]
    assert group.shared_channels is None


def test_a_router_is_told_from_other_weights():
    """Its scores decide which experts run; a gate that only multiplies does not choose, nor does what comes before."""

    def fn(p, x):
        x = x + x @ p["first"]
        scores, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
        y = jnp.einsum("tk,ekn->etn", x, p["experts"])[chosen[:, 0], jnp.arange(x.shape[0])]
        return y * scores[:, :1] * jax.nn.sigmoid(x @ p["gate"]) @ p["last"]

    p = {k: np.ones((6, 6), np.float32) for k in ("first", "gate", "last")}
    p |= {"router": np.ones((6, 4), np.float32), "experts": np.ones((4, 6, 6), np.float32)}
    plan = discover(fn, p, np.ones((3, 6), np.float32))
    assert [s.path for _, s in plan.sites() if s.router] == ["router"]
    assert plan.to_dict() == Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).to_dict()


def test_an_empty_weight_and_an_empty_input_are_no_obstacle() -> None:
    """As in a layer that is configured with no hidden channels, and a batch that has no images."""

    def fn(p: Any, x: jax.Array, images: jax.Array) -> jax.Array:
        y = x @ p["w"]
        return y + y @ p["a"] @ p["b"] + images.reshape(-1, 8).sum(0) @ p["v"] + (images.reshape(-1, 8) @ p["v"]).sum(0)

    plan = discover(fn, spec(w=(8, 16), a=(16, 0), b=(0, 16), v=(8, 16)), *spec(x=(4, 8), images=(0, 2, 4)).values())
    assert not plan.skipped
    assert {s.path for _, s in plan.sites()} == {"w", "v"}
