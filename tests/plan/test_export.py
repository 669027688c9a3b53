"""A function of packed parameters as a StableHLO artifact."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from quant_helpers import random_packed

import awq_jax
from awq_jax import qtensor
from awq_jax.kernels.exported import unless_exported


def test_the_static_fields_come_back():
    q, _ = random_packed(40, 5, bits=3, symmetric=True)
    *values, placement = (getattr(q, name) for name in (*qtensor.STATIC, "placement"))
    assert qtensor._static_from_json(qtensor._static_to_json((*values, placement))) == (*values, None)
    _, tree = jax.tree.flatten(q)
    _, static = tree.node_data()
    assert tuple(static) == (*values, None), "JAX keeps the static fields in this order"


def test_an_exported_function_is_serialized_and_read():
    pytest.importorskip("flatbuffers")
    q, _ = random_packed(40, 5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 40)), jnp.float32)
    bound = awq_jax.bind(lambda p, x: x @ p["w"])
    data = jax.export.export(jax.jit(bound))({"w": q}, x).serialize()
    again = jax.export.deserialize(data).call({"w": q}, x)
    np.testing.assert_allclose(again, bound({"w": q}, x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(again, x @ q.dequantize(), rtol=1e-4, atol=1e-4)


def test_compiled_code_is_left_out_of_what_is_exported():
    pytest.importorskip("flatbuffers")

    def fn(x):
        return 2 * unless_exported(lambda x: x + 1, lambda x: x - 1, x)

    x = jnp.arange(3.0)
    assert fn(x).tolist() == jax.jit(fn)(x).tolist() == [2, 4, 6]
    assert jax.export.export(jax.jit(fn))(x).call(x).tolist() == [-2, 0, 2]
    assert jax.jit(fn)(x).tolist() == [2, 4, 6]
