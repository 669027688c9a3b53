"""A packed NNX model where a module is wanted."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import awq_jax


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.head = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x: jax.Array, scale: float = 1.0) -> jax.Array:
        return self.head(jax.nn.relu(self.up(x))) * scale


def test_it_splits_merges_and_compiles() -> None:
    x = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    fn, params = awq_jax.nnx.functional(Model(nnx.Rngs(0)))
    q = awq_jax.quantize(params, awq_jax.discover(fn, params, x), method="rtn", group_size=32, progress=False)
    packed = awq_jax.nnx.Packed(fn, q, width=32)
    dense = jax.tree.map(
        lambda a: a.dequantize() if isinstance(a, awq_jax.QuantizedTensor) else a,
        q,
        is_leaf=lambda a: isinstance(a, awq_jax.QuantizedTensor),
    )
    want = 2 * fn(dense, x)
    assert packed.width == 32
    np.testing.assert_allclose(packed(x, scale=2.0), want, rtol=1e-4, atol=1e-4)
    graph, state = nnx.split(packed)
    assert any(a.dtype == jnp.uint32 for a in jax.tree.leaves(state)), "packed words are a part of its state"
    np.testing.assert_allclose(jax.jit(lambda s: nnx.merge(graph, s)(x))(state) * 2, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(nnx.jit(lambda m: m(x))(packed) * 2, want, rtol=1e-4, atol=1e-4)
