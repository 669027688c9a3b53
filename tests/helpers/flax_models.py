"""Three small models as a user would write them: Linen, NNX with experts, Linen with scanned layers."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

# Sizes chosen so that the three models share most compiled shapes.
D, V, HEADS, EXPERTS, WIDTH, LAYERS = 32, 48, 2, 2, 16, 2


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        b, t, d = x.shape
        heads = {"query": HEADS, "key": 1, "value": 1}
        size = d // HEADS
        q, k, v = (nn.Dense(h * size, use_bias=False, name=n)(x).reshape(b, t, h, size) for n, h in heads.items())
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return nn.Dense(d, use_bias=False, name="out")(y.reshape(b, t, d))


class Decoder(nn.Module):
    """Pre-norm blocks, grouped-query attention, SwiGLU; the embedding is also the output projection."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(V, D, name="wte")
        x = embed(tokens) + self.param("wpe", nn.initializers.normal(0.3), (64, D))[: tokens.shape[1]]
        for i in range(LAYERS):
            x = x + Attention(name=f"attention_{i}")(nn.RMSNorm(name=f"ln_{i}")(x))
            h = nn.RMSNorm(name=f"ln_mlp_{i}")(x)
            gate, up = (nn.Dense(D, use_bias=False, name=f"{n}_{i}")(h) for n in ("gate", "up"))
            x = x + nn.Dense(D, use_bias=False, name=f"down_{i}")(nn.silu(gate) * up)
        return embed.attend(nn.RMSNorm(name="ln_final")(x))


class MixtureOfExperts(nnx.Module):
    """Every expert sees every token; the router's probabilities weigh the results."""

    def __init__(self, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
        self.router = nnx.Linear(D, EXPERTS, use_bias=False, rngs=rngs)
        self.w_gate = nnx.Param(init(rngs.params(), (EXPERTS, D, WIDTH)))
        self.w_up = nnx.Param(init(rngs.params(), (EXPERTS, D, WIDTH)))
        self.w_down = nnx.Param(init(rngs.params(), (EXPERTS, WIDTH, D)))

    def __call__(self, x):
        weight = jax.nn.softmax(self.router(x))
        gate = jnp.einsum("btd,edf->btef", x, self.w_gate[...])
        up = jnp.einsum("btd,edf->btef", x, self.w_up[...])
        return jnp.einsum("btef,efd,bte->btd", jax.nn.silu(gate) * up, self.w_down[...], weight)


class MoeModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(D, rngs=rngs) for _ in range(LAYERS + 1)])
        self.blocks = nnx.List([MixtureOfExperts(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(D, V, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for norm, block in zip(self.norms, self.blocks, strict=False):
            x = x + block(norm(x))
        return self.head(self.norms[-1](x))


class ScannedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm(name="norm")(x)
        h = nn.relu(nn.Dense(D, name="fc1")(h))
        return x + nn.Dense(D, name="fc2")(h), None


class ScannedModel(nn.Module):
    """One traced block, its parameters stacked over the layers."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(V, D, name="embed")(tokens)
        stack = nn.scan(ScannedBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = stack(name="blocks")(x, None)
        return nn.Dense(V, name="head")(nn.LayerNorm(name="norm")(x))
