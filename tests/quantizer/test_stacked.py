"""Weights that share a parameter are packed as they would be alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant_helpers import dense

import awq_jax
from awq_jax.errors import ConfigError
from awq_jax.plan.plan import Plan
from awq_jax.qtensor import QuantizedTensor

D, F = 32, 48
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(96, D)), jnp.float32)
WIDE = {"gate": (D, F), "up": (D, F)}
P = {k: jnp.asarray(RNG.normal(size=s) / 6, jnp.float32) for k, s in (WIDE | {"down": (F, D), "last": (D, D)}).items()}
P["norm"] = jnp.asarray(np.exp(RNG.normal(size=D)), jnp.float32)
OPTIONS: dict[str, Any] = {"group_size": 16, "n_grid": 3, "progress": False}


def norm(x: jax.Array, w: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * w


def mlp(p: Any, x: jax.Array) -> jax.Array:
    h = norm(x, p["norm"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def alone(p: Any, x: jax.Array) -> jax.Array:
    return mlp(p, x) @ p["last"]


def arrays(q: QuantizedTensor, *index: Any, columns: slice = slice(None)) -> list[np.ndarray]:
    return [np.asarray(a)[index][..., columns] for a in (q.qweight, q.scales, q.zeros)]


@pytest.mark.parametrize("how", ["unpacked", "split"])
def test_parts_are_packed_as_leaves_of_their_own(how: str) -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        gate, up = p["both"] if how == "unpacked" else jnp.split(p["both"], 2, axis=1)
        return alone({"gate": gate, "up": up} | p, x)

    join = jnp.stack if how == "unpacked" else lambda w: jnp.concatenate(w, 1)
    together = {k: w for k, w in P.items() if k not in WIDE} | {"both": join([P["gate"], P["up"]])}
    want = awq_jax.quantize(P, [X], apply_fn=alone, **OPTIONS)
    plan = awq_jax.calibrate(fn, together, [X], progress=False)
    assert Plan.from_dict(plan.plan.to_dict()).to_dict() == plan.plan.to_dict()
    got = awq_jax.quantize(together, plan, **OPTIONS)
    for i, name in enumerate(WIDE):
        at = ((i,), slice(None)) if how == "unpacked" else ((), slice(i * F, (i + 1) * F))
        for a, b in zip(arrays(got["both"], *at[0], columns=at[1]), arrays(want[name]), strict=True):
            np.testing.assert_array_equal(a, b)
    for a, b in zip(arrays(got["down"]), arrays(want["down"]), strict=True):
        np.testing.assert_array_equal(a, b)
    bound = awq_jax.bind(fn)
    np.testing.assert_allclose(bound(got, X), fn(dense(got), X), rtol=1e-4, atol=1e-4)
    text = str(jax.make_jaxpr(bound)(got, X))
    assert f"f32[2,{D},{F}]" not in text, "the whole parameter is dequantized"
    assert f"f32[{D},{2 * F}]" not in text, "the whole parameter is dequantized"


def test_layers_stacked_along_any_axis_have_the_same_codes() -> None:
    """First axis by `lax.scan`, last axis by the counter of a loop: the same arrays, since batch axes go first."""
    layers = {k: jnp.stack([w, w[::-1]]) for k, w in P.items() if k != "last"}
    first = layers | {"last": P["last"]}
    last = {k: jnp.moveaxis(w, 0, -1) for k, w in layers.items()} | {"last": P["last"]}

    def scanned(p: Any, x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, w: (mlp(w, x), None), x, {k: p[k] for k in layers})
        return x @ p["last"]

    def counted(p: Any, x: jax.Array) -> jax.Array:
        x = jax.lax.fori_loop(0, 2, lambda i, x: mlp({k: p[k][..., i] for k in layers}, x), x)
        return x @ p["last"]

    want = awq_jax.quantize(first, [X], apply_fn=scanned, **OPTIONS)
    got = awq_jax.quantize(last, [X], apply_fn=counted, **OPTIONS)
    for name in ("gate", "up", "down"):
        assert (want[name].axes, got[name].axes) == ("bkn", "knb")
        for a, b in zip(arrays(got[name]), arrays(want[name]), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(got["norm"], np.moveaxis(np.asarray(want["norm"]), 0, -1), rtol=1e-6)
    for p, fn in ((want, scanned), (got, counted)):
        np.testing.assert_allclose(awq_jax.bind(fn)(p, X), fn(dense(p), X), rtol=1e-4, atol=1e-4)


def test_parts_that_do_not_fit_are_named() -> None:
    def odd_rows(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x[:, :8] @ p["w"][:8] + x[:, 8:] @ p["w"][8:]) @ p["last"]

    def unread(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["w"][:, :32]) @ p["last"]

    for fn, why in ((odd_rows, "rows 0 to 7, which are no whole groups of 16"), (unread, "read by no matmul")):
        with pytest.raises(ConfigError, match=why):
            awq_jax.quantize(
                {"w": P["gate"], "last": jnp.ones((48 if fn is odd_rows else 32, 32))}, [X], apply_fn=fn, **OPTIONS
            )
