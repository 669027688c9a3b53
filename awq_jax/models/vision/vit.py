"""CLIP's and SigLIP's vision transformers."""

import jax
import jax.numpy as jnp
from flax import nnx

from awq_jax.models.config import MLPConfig, NormConfig
from awq_jax.models.layers.linear import Linear
from awq_jax.models.layers.mlp import MLP
from awq_jax.models.layers.norm import Norm
from awq_jax.models.vision.config import ViTConfig


class Patches(nnx.Module):
    """A convolution whose stride is its size: one linear of each patch, ``weight [size, channels, *patch]``."""

    def __init__(self, size: int, patch: tuple[int, ...], use_bias: bool, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (size, *patch)) * 0.1)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(size))
        self.use_bias = use_bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x [..., channels * patch pixels]`` to ``[..., size]``."""
        weight = self.weight.get_value()
        y = jnp.einsum("...p,np->...n", x, weight.reshape(weight.shape[0], -1))
        return (y + self.bias.get_value() if self.use_bias else y).astype(x.dtype)


class Table(nnx.Module):
    """Learned vectors ``embedding [rows, size]``."""

    def __init__(self, rows: int, size: int, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (rows, size)) * 0.02)

    def __call__(self) -> jax.Array:
        return self.embedding.get_value()


class Embeddings(nnx.Module):
    """Pictures to the sequences that the layers read."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        c = config
        if c.class_token:
            self.class_embedding = nnx.Param(jnp.zeros(c.size))
        self.patch_embedding = Patches(c.size, (c.channels, c.patch, c.patch), not c.class_token, rngs)
        self.position_embedding = Table(c.side**2 + c.class_token, c.size, rngs)
        self.config = config

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """``pixels [I, channels, image, image]`` to ``[I, L, size]``."""
        c = self.config
        count = pixels.shape[0]
        x = pixels.reshape(count, c.channels, c.side, c.patch, c.side, c.patch)
        x = self.patch_embedding(x.transpose(0, 2, 4, 1, 3, 5).reshape(count, c.side**2, -1))
        if c.class_token:
            first = jnp.broadcast_to(self.class_embedding.get_value().astype(x.dtype), (count, 1, c.size))
            x = jnp.concatenate([first, x], axis=1)
        return x + self.position_embedding().astype(x.dtype)


class Attention(nnx.Module):
    """Every token attends to all of its picture."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(config.size, config.size, rngs=rngs) for _ in range(4)
        )
        self.heads = config.heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x [I, L, size]`` to the same shape."""
        q, k, v = (m(x).reshape(*x.shape[:-1], self.heads, -1) for m in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, None).reshape(x.shape))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None) -> jax.Array:
    """Attention in both directions.

    Args:
      q, k, v: ``[..., L, heads, head_dim]``.
      seen: bool ``[L, L]``, who attends to whom; None for everyone to all.

    Returns:
      As ``q``.
    """
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    if seen is not None:
        scores = jnp.where(seen, scores, -jnp.inf)
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


class Layer(nnx.Module):
    """Attention and MLP, each after a norm and added."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        norm = NormConfig("layer", config.eps, bias=True)
        self.layer_norm1, self.layer_norm2 = Norm(norm, config.size), Norm(norm, config.size)
        self.self_attn = Attention(config, rngs)
        self.mlp = MLP(config.size, MLPConfig(config.mlp, config.activation, gated=False, bias=True), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x [I, L, size]`` to the same shape."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ViT(nnx.Module):
    """The tower."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        norm = NormConfig("layer", config.eps, bias=True)
        self.embeddings = Embeddings(config, rngs)
        if config.class_token:
            self.pre_layernorm = Norm(norm, config.size)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])
        self.post_layernorm = Norm(norm, config.size)
        self.config = config

    def __call__(self, pixels: jax.Array) -> list[jax.Array]:
        """Hidden states ``[I, L, size]``: what the first layer reads, then what each layer makes."""
        x = self.embeddings(pixels)
        states = [self.pre_layernorm(x) if self.config.class_token else x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states
