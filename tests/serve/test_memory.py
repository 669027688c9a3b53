"""Serving takes the packed weights, the cache, and at most one dequantized weight: as the compiler counts it."""

import jax
import jax.numpy as jnp
from quant_helpers import random_packed

import awq_jax
from awq_jax.bench import decoding, random_models
from awq_jax.kernels import xla
from awq_jax.qtensor import is_quantized
from awq_jax.serve.cpu_copy import resident
from awq_jax.serve.sampling import Draws
from awq_jax.serve.served_weights import ServedWeights

TILE = 2 * 512 * 256 * 4  # gate and up of the shape below in float32, which is how a CPU multiplies
REST = 1 << 18  # activations of 16 tokens: the widest are 1024 wide, 16 of them at once


def test_one_weight_is_dequantized_at_a_time():
    c = random_models.config("small", layers=3)
    graphdef, params = random_models.random_model(c, "bfloat16")
    served = decoding.DecodingTimer(ServedWeights(graphdef, c, params, copy=False), context=16, steps=8)
    packed = [q for q in jax.tree.leaves(served.params, is_leaf=is_quantized) if is_quantized(q)]
    assert len(packed) == 12
    assert decoding.largest_tile(served.params, 4) == TILE
    for program, temp in served.temp_bytes().items():
        assert temp <= TILE + REST, program
    # The measure sees what is dequantized at once.
    arguments = (served.params, served._tokens, served._lengths, Draws())
    generator = served.weights.serving()[0]
    eager = jax.jit(lambda p, *a: generator._prefill(resident(p), *a, slots=64))
    found = eager.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert found > sum(q.k * q.n * 4 for q in packed) > 2 * (TILE + REST)


def test_weights_larger_than_a_tile_are_never_floats(monkeypatch):
    monkeypatch.setattr(xla, "CPU_TILE", 512 * 128)
    c = random_models.config("small", layers=3)
    graphdef, params = random_models.random_model(c, "float32")
    served = decoding.DecodingTimer(ServedWeights(graphdef, c, params, copy=False), context=16, steps=8)
    assert max(served.temp_bytes().values()) < TILE / 2 + REST


def test_a_gradient_keeps_no_dequantized_weight(monkeypatch):
    k, layers = 512, 6
    packed = [random_packed(k, k, seed=i)[0] for i in range(layers)]
    x = jnp.ones((4, k))

    def temporary(product):
        def loss(x, packed):
            for q in packed:
                x = jnp.tanh(product(x, q))
            return x.sum()

        return jax.jit(jax.grad(loss)).lower(x, packed).compile().memory_analysis().temp_size_in_bytes

    weight = k * k * 4
    assert temporary(lambda x, q: x @ q.dequantize()) > layers * weight  # what would be kept
    monkeypatch.setattr(xla, "CPU_TILE", k * 128)
    assert temporary(awq_jax.dot) < weight
