"""Attention whose keys and values come from a latent (DeepSeek-V2's MLA, arXiv 2405.04434)."""

import jax
import jax.numpy as jnp
from flax import nnx

from awq_jax.models.config import AttentionConfig, LatentConfig, LayerConfig, NormConfig
from awq_jax.models.layers import rope
from awq_jax.models.layers.attention import Step, attend
from awq_jax.models.layers.cache import KeyValues
from awq_jax.models.layers.linear import Linear
from awq_jax.models.layers.norm import Norm


class LatentAttention(nnx.Module):
    """Attention as `LatentConfig` describes it."""

    def __init__(self, size: int, layer: LayerConfig, rngs: nnx.Rngs):
        c = layer.attention
        assert isinstance(c, LatentConfig)
        norm = NormConfig(eps=c.eps)
        if c.q_rank is None:
            self.q_proj = Linear(size, c.heads * c.head_dim, use_bias=False, rngs=rngs)
        else:
            self.q_a_proj = Linear(size, c.q_rank, use_bias=c.bias, rngs=rngs)
            self.q_a_layernorm = Norm(norm, c.q_rank)
            self.q_b_proj = Linear(c.q_rank, c.heads * c.head_dim, use_bias=False, rngs=rngs)
        self.kv_a_proj_with_mqa = Linear(size, c.kv_rank + c.rope_dim, use_bias=c.bias, rngs=rngs)
        self.kv_a_layernorm = Norm(norm, c.kv_rank)
        self.kv_b_proj = Linear(c.kv_rank, c.heads * (c.nope_dim + c.value_dim), use_bias=False, rngs=rngs)
        self.o_proj = Linear(c.heads * c.value_dim, size, use_bias=c.bias, rngs=rngs)
        self.layer, self.config = layer, c
        self.scores = AttentionConfig(c.heads, c.heads, c.head_dim, scale=c.scale)

    def __call__(self, x: jax.Array, step: Step, past: KeyValues | None) -> tuple[jax.Array, KeyValues]:
        """``x [B, T, hidden]`` -> the same shape, and keys and values of every head."""
        q, k, v = self.project(x, step)
        kept = KeyValues(k, v) if past is None else past.written(k, v, step.positions[:, 0])
        out = attend(q, kept.keys, kept.values, step.positions, self.scores, self.layer.window)
        return self.o_proj(out.reshape(*x.shape[:-1], -1)), kept

    def project(self, x: jax.Array, step: Step) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of every head, rotated."""
        c, turn = self.config, self.layer.rope
        assert turn is not None
        cos, sin = step.angles[turn]
        shape = (*x.shape[:-1], c.heads, -1)
        q = self.q_proj(x) if c.q_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.reshape(shape)
        q_turned = rope.rotate(q[..., c.nope_dim :], cos, sin, turn.interleaved)
        y = self.kv_a_proj_with_mqa(x)
        k_turned = rope.rotate(y[..., None, c.kv_rank :], cos, sin, turn.interleaved)
        kv = self.kv_b_proj(self.kv_a_layernorm(y[..., : c.kv_rank])).reshape(shape)
        k_turned = jnp.broadcast_to(k_turned, (*kv.shape[:-1], c.rope_dim))
        return (
            jnp.concatenate([q[..., : c.nope_dim], q_turned], axis=-1),
            jnp.concatenate([kv[..., : c.nope_dim], k_turned], axis=-1),
            kv[..., c.nope_dim :],
        )
