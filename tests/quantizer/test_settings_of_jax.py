"""Settings of JAX that whole code bases switch on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awq_jax


@pytest.mark.parametrize(("name", "value"), [("jax_enable_x64", True), ("jax_numpy_rank_promotion", "raise")])
def test_they_change_nothing(name, value):
    x = jax.random.normal(jax.random.key(0), (96, 16))
    p = {"w": jax.random.normal(jax.random.key(1), (16, 8))}

    def model(p, x):
        return x @ p["w"]

    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        q = awq_jax.quantize(p, [x], apply_fn=model, bits=8, group_size=16, quantize_head=True, progress=False)
        y = awq_jax.bind(model)(q, x)
        w = q["w"].dequantize()
    finally:
        jax.config.update(name, before)
    assert y.dtype == w.dtype == jnp.float32
    assert {a.dtype.name for a in jax.tree.leaves(q)} <= {"uint32", "float16", "uint8", "float32"}
    np.testing.assert_allclose(w, p["w"], atol=0.05)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ np.asarray(p["w"], np.float64), atol=0.2)
