"""Weights that are computed of parameters before they are multiplied: packed where that is linear, else with a line."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from operand_bytes import parameters_of_products

import awq_jax
from awq_jax.plan.discover import discover
from awq_jax.trace import interpret

Params = dict[str, Any]
D, H = 64, 96


def fused(xp: ModuleType, p: Params, x: Any) -> Any:
    return x @ xp.concatenate([p["q"], p["kv"]], 1)


def fused_heads(xp: ModuleType, p: Params, x: Any) -> Any:
    w = xp.concatenate([p["q"].T, p["kv"].T]).reshape(-1, 32, D)
    return xp.einsum("td,nhd->tnh", x, w)


def rows_joined(xp: ModuleType, p: Params, x: Any) -> Any:
    return xp.concatenate([x, 2 * x], 1) @ xp.concatenate([p["q"], p["q2"]])


def experts_stacked(xp: ModuleType, p: Params, x: Any) -> Any:
    return xp.einsum("etd,edh->eth", xp.stack([x, -x]), xp.stack([p["q"], p["q2"]]))


def gains(xp: ModuleType, p: Params, x: Any) -> Any:
    return x @ (p["gain"][:, None] * p["q"] / p["width"] * 0.5) @ (-p["down"])


def gain_of_transposed(xp: ModuleType, p: Params, x: Any) -> Any:
    return x @ (p["q"].T * p["gain"]).reshape(4, -1, D).reshape(-1, D).T


def adapted(xp: ModuleType, p: Params, x: Any) -> Any:
    return x @ (p["q"] + 2 * (p["a"] @ p["b"]) - p["q2"])


def padded(xp: ModuleType, p: Params, x: Any) -> Any:
    return xp.concatenate([x, x[:, :4]], 1) @ xp.pad(p["q"], ((0, 4), (3, 0)))


def called(xp: ModuleType, p: Params, x: Any) -> Any:
    w = xp.concatenate([p["q"], p["kv"]], 1)
    return (jax.jit(jnp.dot) if xp is jnp else np.dot)(x, w)


CASES: dict[Callable[..., Any], set[str]] = {
    fused: {"q", "kv"},
    fused_heads: {"q", "kv"},
    rows_joined: {"q", "q2"},
    experts_stacked: {"q", "q2"},
    gains: {"q", "down"},
    gain_of_transposed: {"q"},
    adapted: {"q", "q2"},
    padded: {"q"},
    called: {"q", "kv"},
}


def params() -> Params:
    rng = np.random.default_rng(0)
    shapes = {"q": (D, H), "q2": (D, H), "kv": (D, 2 * H), "down": (H, D), "a": (D, 4), "b": (4, H)}
    p: Params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return p | {n: (1 + rng.random(s)).astype(np.float32) for n, s in (("gain", D), ("width", H))}


@pytest.mark.parametrize("fn", CASES, ids=lambda fn: fn.__name__)
def test_linear_steps_are_done_around_packed_products(fn: Callable[..., Any]) -> None:
    used = CASES[fn]
    p, x = params(), np.random.default_rng(1).normal(size=(5, D)).astype(np.float32)

    def model(p: Params, x: jax.Array) -> jax.Array:
        return fn(jnp, p, x)

    plan = discover(model, p, x)
    assert {site.path for _, site in plan.sites()} - {"a", "b"} == used
    q = awq_jax.quantize(p, plan, method="rtn", bits=4, group_size=32, quantize_head=True, skip=("a", "b"))
    multiplied: list[int] = []

    def matmul(x: jax.Array, w: awq_jax.QuantizedTensor) -> jax.Array:
        multiplied.append(w.k * w.n)
        return x @ w.dequantize()

    y = interpret.run(interpret.trace(model, q, x), q, x, matmul=matmul)
    assert sorted(multiplied) == sorted(p[name].size for name in used), "a weight was made float to be multiplied"
    stored = {n: np.asarray(a.dequantize() if n in used else a, np.float64) for n, a in q.items()}
    want = fn(np, stored, x.astype(np.float64))
    np.testing.assert_allclose(y, want, rtol=2e-4, atol=2e-4 * np.abs(want).max())


def test_what_is_not_linear_says_what_it_is() -> None:
    p, x = params(), jnp.ones((3, D))
    p["mask"] = np.tri(D, H, dtype=np.float32)

    def model(p: Params, x: jax.Array) -> jax.Array:
        y = x @ jnp.round(p["q"]) + x @ (p["q2"] * p["mask"])
        return (x @ (p["kv"] / jnp.linalg.norm(p["kv"], axis=0))).sum() + y

    plan = discover(model, p | {"used": p["q"]}, x)
    assert not plan.groups
    assert {path: re.sub(r" \(.*?\)", "", why) for path, why in plan.skipped.items()} == {
        "q": "its matmul reads what round makes of it",
        "q2": "its matmul reads what mul makes of it",
        "mask": "its matmul reads what mul makes of it",
        "kv": "it is also read by mul",
    }


def test_a_weight_computed_outside_of_a_loop_has_a_line() -> None:
    def model(p: Params, x: jax.Array) -> jax.Array:
        layers = jnp.stack([jnp.tanh(p["w0"]), jnp.tanh(p["w1"])])
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0] @ p["head"]

    p = {name: jnp.ones((8, 8)) for name in ("w0", "w1", "head")}
    assert set(discover(model, p, jnp.ones((2, 8))).skipped) == {"w0", "w1"}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_parameter_of_every_product_has_a_line(name: str) -> None:
    case = zoo.MODELS[name]()
    plan = discover(case.fn, case.params, *case.args)
    sizes = parameters_of_products(case.fn, case.params, *case.args)
    named = {site.path for _, site in plan.sites()} | set(plan.skipped)
    assert sum(sizes.values()) > 0
    assert {path: n for path, n in sizes.items() if path not in named} == {}
