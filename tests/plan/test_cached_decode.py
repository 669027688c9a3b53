"""A plan found on the forward pass serves in the model's own step function, which reads a cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import awq_jax

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
