"""A plan found on the forward pass serves in the model's own step function, which reads a cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awq_jax
from awq_jax.plan.discover import discover

D, T = 32, 6


def attend(p: Any, x: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    scores = jnp.where(seen, jnp.einsum("tc,sc->ts", x @ p["q"], k), -1e9)
    x = x + jax.nn.softmax(scores) @ v @ p["o"]
    return (x + jax.nn.silu(x @ p["gate"]) * (x @ p["up"]) @ p["down"]) @ p["head"]


def forward(p: Any, x: jax.Array) -> jax.Array:
    return attend(p, x, x @ p["k"], x @ p["v"], jnp.tri(len(x), dtype=bool))


def step(p: Any, x: jax.Array, cache: tuple[jax.Array, jax.Array], at: jax.Array) -> Any:
    k, v = (jax.lax.dynamic_update_slice(c, x @ p[name], (at, 0)) for c, name in zip(cache, "kv", strict=True))
    return attend(p, x, k, v, (jnp.arange(T) <= at)[None]), (k, v)


def test_steps_with_a_cache_give_the_rows_of_the_forward_pass() -> None:
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys(("q", "k", "v", "o", "head"), (D, D)) | {"gate": (D, 64), "up": (D, 64), "down": (64, D)}
    p = {name: rng.normal(size=shape).astype(np.float32) / 8 for name, shape in shapes.items()}
    x = rng.normal(size=(T, D)).astype(np.float32)
    calib = awq_jax.calibrate(forward, p, [x], progress=False)
    assert any(g.absorbers for g in calib.plan.groups)
    q = awq_jax.quantize(p, calib, group_size=32, progress=False)
    want = forward({k: a.dequantize() if isinstance(a, awq_jax.QuantizedTensor) else a for k, a in q.items()}, x)
    bound, cache = awq_jax.bind(step), (jnp.zeros((T, D)), jnp.zeros((T, D)))
    for at in range(T):
        y, cache = bound(q, x[at : at + 1], cache, jnp.int32(at))
        np.testing.assert_allclose(y[0], want[at], rtol=1e-4, atol=1e-4)


WRITES = {
    "dynamic_update_slice": lambda cache, new: jax.lax.dynamic_update_slice(cache, new, (1, 0)),
    "scatter": lambda cache, new: cache.at[jnp.arange(T) + 1].set(new),
    "scatter-add": lambda cache, new: cache.at[jnp.arange(T) + 1].add(new),
}


def through_caches(p: Any, x: jax.Array, blank: jax.Array, write: Any) -> Any:
    """Two stacked layers, each of which writes keys and values into a cache of its own and reads them there."""
    seen = jnp.concatenate([jnp.zeros((T, 1), bool), jnp.tri(T, dtype=bool)], 1)

    def layer(x: jax.Array, given: Any) -> Any:
        p, k, v = given
        k, v = write(k, x @ p["k"]), write(v, x @ p["v"])
        return attend(p, x, k, v, seen), (k, v)

    return jax.lax.scan(layer, x, (p, blank, blank))


def absorbers_of_o(apply_fn: Any) -> list[str]:
    shapes = dict.fromkeys(("q", "k", "v", "o", "head"), (D, D)) | {"gate": (D, 64), "up": (D, 64), "down": (64, D)}
    p = {name: jax.ShapeDtypeStruct((2, *shape), jnp.float32) for name, shape in shapes.items()}
    groups = discover(apply_fn, p, jax.ShapeDtypeStruct((T, D), jnp.float32)).groups
    return [a.path for g in groups for a in g.absorbers if any(s.path == "o" for s in g.sites)]


@pytest.mark.parametrize("write", WRITES)
def test_a_scale_passes_a_cache_that_begins_empty_and_that_nobody_returns(write: str) -> None:
    assert absorbers_of_o(lambda p, x: through_caches(p, x, jnp.zeros((2, T + 1, D)), WRITES[write])[0]) == ["v"]


def test_no_scale_passes_a_cache_that_is_returned_or_that_holds_something() -> None:
    def call(p: Any, x: jax.Array, before: float) -> Any:
        return through_caches(p, x, jnp.full((2, T + 1, D), before), WRITES["dynamic_update_slice"])

    assert absorbers_of_o(lambda p, x: call(p, x, 0.0)) == []
    assert absorbers_of_o(lambda p, x: call(p, x, 1.0)[0]) == []
