"""A gate and shared experts read what the chosen experts read sorted: they take the scale of those."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awq_jax
from awq_jax.errors import PlanError
from awq_jax.plan import fold
from awq_jax.plan.plan import Plan
from awq_jax.plan.validate import validate
from awq_jax.plan.verify import verify

E, D, F = 4, 64, 96


def moe(p, x, also=lambda x: 0.0):
    """One layer: chosen experts (2 of 4) whose rows are sorted, and one that all rows share."""
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["norm"]
    w, chosen = jax.lax.top_k(jax.nn.softmax(x.astype(jnp.float32).reshape(-1, 8, D) @ p["router"]), 2)
    chosen, w = chosen.reshape(-1), w.reshape(-1)
    order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=E)
    rows = jnp.repeat(x, 2, axis=0)[order]
    h = jax.nn.silu(jax.lax.ragged_dot(rows, p["gate"], sizes)) * jax.lax.ragged_dot(rows, p["up"], sizes)
    y = jax.lax.ragged_dot(h, p["down"], sizes)[jnp.argsort(order)] * w[:, None]
    shared = (jax.nn.silu(x @ p["shared_gate"]) * (x @ p["shared_up"])) @ p["shared_down"]
    return jnp.tanh(y.reshape(-1, 2, D).sum(1) + shared + also(x)) @ p["head"]


def parameters():
    shapes = {
        "router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D), "shared_gate": (D, F),
        "shared_up": (D, F), "shared_down": (F, D), "head": (D, D),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    made = {name: jnp.asarray(rng.normal(size=s) / np.sqrt(s[-2]), jnp.float32) for name, s in shapes.items()}
    return made | {"norm": jnp.asarray(np.exp(rng.normal(size=D)), jnp.float32)}


def rows(seed, n=64):
    mixed = np.random.default_rng(0).normal(size=(16, D)) / 4
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, 16)) @ mixed, jnp.float32)


def test_one_scale_for_all_that_read_the_norm() -> None:
    p, x = parameters(), rows(1)
    plan = verify(awq_jax.discover(moe, p, x), moe, p, x)
    groups = {g.name: g for g in plan.groups}
    assert [a.path for a in groups["gate"].absorbers] == ["norm"]
    for name, sites in {"router": {"router", "shared_gate", "shared_up"}}.items():
        assert {s.path for s in groups[name].sites} == sites
        assert groups[name].follows.group == "gate"
        np.testing.assert_array_equal(groups[name].follows.index, np.arange(D))
    assert "scaled as gate" in str(plan)
    scale = np.broadcast_to(np.exp(np.random.default_rng(2).normal(size=D)), (E, D)).astype(np.float32)
    scaled = fold.apply(plan, p, {"gate": scale})
    for name, by in {"norm": 1 / scale[0], "gate": scale[:, :, None], "router": scale[0][:, None]}.items():
        np.testing.assert_allclose(scaled[name], p[name] * by, rtol=1e-6)
    np.testing.assert_allclose(scaled["shared_up"], p["shared_up"] * scale[0][:, None], rtol=1e-6)
    np.testing.assert_allclose(moe(scaled, x), moe(p, x), rtol=2e-4, atol=2e-5)


def test_what_is_packed_has_the_scale_and_loses_less() -> None:
    p = parameters()
    batches = [rows(1, 1024)]
    calib = awq_jax.calibrate(moe, p, batches, progress=False)
    q, report = awq_jax.quantize(p, calib, group_size=32, progress=False, return_report=True)
    assert {r.path: r.scale for r in report.layers if r.path != "head"} == dict.fromkeys(
        ("gate", "up", "down", "shared_gate", "shared_up", "shared_down"), "folded"
    )
    s = np.asarray(p["norm"] / q["norm"])
    assert s.max() / s.min() > 2
    np.testing.assert_allclose(q["router"], p["router"] * s[:, None], rtol=1e-5)
    for name in ("shared_up", "up"):  # row by row, what is stored is s times what was
        stored, was = np.asarray(q[name].dequantize()), np.asarray(p[name])
        slope = (stored * was).sum(-1) / (was**2).sum(-1)
        np.testing.assert_allclose(slope, np.broadcast_to(s, slope.shape), rtol=0.25)
    x = rows(9, 256)
    unscaled = Plan(tuple(g.without_absorbers("") if g.is_folded else g for g in calib.plan.groups), calib.plan.skipped)
    plain = awq_jax.calibrate(moe, p, batches, plan=unscaled, progress=False)
    without = awq_jax.quantize(p, plain, group_size=32, progress=False)
    want = np.asarray(moe(p, x), np.float64)
    # The median row: those that go to another expert move by their own size, whatever is packed.
    lost = [np.median(np.linalg.norm(np.asarray(awq_jax.bind(moe)(t, x)) - want, axis=1)) for t in (q, without)]
    assert lost[0] < lost[1]


def one_by_one(p, x):
    """Every expert by itself on all rows, those of others zeroed."""
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["norm"]
    w, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
    mask = jax.nn.one_hot(chosen, E)  # [rows, 2, E]
    sent = jnp.einsum("td,tke->ted", x, mask)
    y = 0.0
    for e in range(E):
        h = jax.nn.silu(sent[:, e] @ p["gate"][e]) * (sent[:, e] @ p["up"][e])
        y += (h @ p["down"][e]) * (w * mask[:, :, e]).sum(1)[:, None]
    return jnp.tanh(y) @ p["head"]


def in_a_list(p, x):
    """The same with a parameter for each expert, in modules of a list."""
    p = p | {n: [p["layers"][0]["experts"][e][n] for e in range(E)] for n in ("gate", "up", "down")}
    return one_by_one(p, x)


def listed(p):
    experts = [{n: p[n][e] for n in ("gate", "up", "down")} for e in range(E)]
    rest = {n: a for n, a in p.items() if n not in ("gate", "up", "down")}
    return rest | {"layers": [{"experts": experts}]}


@pytest.mark.parametrize(("fn", "made"), [(one_by_one, lambda p: p), (in_a_list, listed)], ids=["stacked", "listed"])
def test_experts_that_are_multiplied_one_by_one_share_a_scale(fn, made) -> None:
    names = [n for n in parameters() if not n.startswith("shared")]
    p = made({n: parameters()[n] for n in names})
    plan = verify(awq_jax.discover(fn, p, rows(1)), fn, p, rows(1))
    first, *rest = (g for g in plan.groups if "gate" in g.name)
    assert [a.path for a in first.absorbers] == ["norm"]
    router = next(g for g in plan.groups if g.name == "router")
    assert [g.follows.group for g in (*rest, router)] == [first.name] * E
    assert all(g.absorbers for g in plan.groups if "down" in g.name)


def test_another_reader_of_the_rows_is_in_the_way() -> None:
    plan = awq_jax.discover(lambda p, x: moe(p, x, lambda x: jnp.square(x)), parameters(), rows(1))
    groups = {g.name: g for g in plan.groups}
    assert not groups["gate"].is_folded
    assert not groups["router"].is_folded
    assert "also used by" in groups["gate"].reason


def test_a_plan_is_stored_with_who_follows_whom(tmp_path) -> None:
    plan = awq_jax.discover(moe, parameters(), rows(1))
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.to_dict() == plan.to_dict()
    groups = {g.name: g for g in again.groups}
    data = plan.to_dict()
    for g in data["groups"]:
        if g["name"] == groups["router"].name:
            g["follows"]["group"] = "nobody"
    with pytest.raises(PlanError, match="cannot follow nobody"):
        validate(Plan.from_dict(data), parameters())
