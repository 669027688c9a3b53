"""A Linen model of your own: train a little, quantize with three lines, serve packed.

python examples/linen_app.py
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.typing import VariableDict

import awq_jax

VOCAB, WIDTH, LENGTH = 64, 64, 32


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.RMSNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, use_bias=False)(h, mask=nn.make_causal_mask(x[..., 0]))
        h = nn.RMSNorm()(x)
        gate, up = nn.Dense(128, use_bias=False)(h), nn.Dense(128, use_bias=False)(h)
        return x + nn.Dense(WIDTH, use_bias=False)(nn.silu(gate) * up)


class LanguageModel(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCAB, WIDTH)(tokens)
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(VOCAB, use_bias=False)(nn.RMSNorm()(x))


def batch(key: jax.Array) -> jax.Array:
    """Sequences that count up by seven from a random start, with one token in ten drawn at random."""
    k1, k2, k3 = jax.random.split(key, 3)
    tokens = (jax.random.randint(k1, (16, 1), 0, VOCAB) + 7 * jnp.arange(LENGTH)) % VOCAB
    noise = jax.random.randint(k2, tokens.shape, 0, VOCAB)
    return jnp.where(jax.random.bernoulli(k3, 0.1, tokens.shape), noise, tokens)


def loss_of(logits: Any, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def train(model: LanguageModel, steps: int = 150) -> VariableDict:
    params = model.init(jax.random.key(0), batch(jax.random.key(0)))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params: VariableDict, state: optax.OptState, key: jax.Array) -> tuple[VariableDict, optax.OptState]:
        tokens = batch(key)
        grads = jax.grad(lambda p: loss_of(model.apply(p, tokens), tokens))(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(1), steps):
        params, state = step(params, state, key)
    return params


def main() -> tuple[float, float]:
    model = LanguageModel()
    params = train(model)

    # The three lines.
    calib = awq_jax.calibrate(model.apply, params, [batch(k) for k in jax.random.split(jax.random.key(2), 4)])
    qparams = awq_jax.quantize(params, calib, bits=4, group_size=32)
    serve = jax.jit(awq_jax.bind(model.apply))

    tokens = batch(jax.random.key(3))
    before, after = loss_of(model.apply(params, tokens), tokens), loss_of(serve(qparams, tokens), tokens)
    print(calib.plan)
    print(f"loss: float {before:.4f}, 4-bit {after:.4f}")
    return float(before), float(after)


if __name__ == "__main__":
    main()
