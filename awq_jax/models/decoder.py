"""The reference decoder: a plain Flax NNX transformer, driven by `ModelConfig`.

Layers are unrolled (a scan would copy each layer's packed weights before a custom call) and no
module transform is used: split the state, call under `jax.jit`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from awq_jax.models import rope
from awq_jax.models.config import LayerConfig, ModelConfig
from awq_jax.nnx import Linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, one array per layer, ``[B, S, KV, head_dim]``.

    Slot ``s`` of a row holds position ``s``; slots beyond a row's length are garbage and never read.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


def init_cache(config: ModelConfig, batch: int, length: int, dtype: Any) -> Cache:
    """An empty cache for ``batch`` rows of up to ``length`` tokens."""
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    return Cache(*(tuple(jnp.zeros(shape, dtype) for _ in config.layers) for _ in range(2)))


class RMSNorm(nnx.Module):
    """``scale * x / rms(x)`` over the last axis, in float32, returned in the dtype of ``x``."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        return self.scale.get_value() * h.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, rngs: nnx.Rngs):
        c, inner, kv = config, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(c.hidden_size, inner, use_bias=c.qkv_bias, rngs=rngs)
        self.k_proj = Linear(c.hidden_size, kv, use_bias=c.qkv_bias, rngs=rngs)
        self.v_proj = Linear(c.hidden_size, kv, use_bias=c.qkv_bias, rngs=rngs)
        self.o_proj = Linear(inner, c.hidden_size, use_bias=c.o_bias, rngs=rngs)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.config, self.layer = config, layer

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        past: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """``x [B, T, hidden]`` -> the same shape, and this layer's keys and values ``[B, S, KV, head_dim]``."""
        c = self.config
        batch, length, _ = x.shape
        q = self.q_proj(x).reshape(batch, length, c.num_heads, c.head_dim)
        k = self.k_proj(x).reshape(batch, length, c.num_kv_heads, c.head_dim)
        v = self.v_proj(x).reshape(batch, length, c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.layer.rope:
            q, k = rope.rotate(q, *angles), rope.rotate(k, *angles)
        if past is not None:
            k, v = (_write(old, new, positions[:, 0]) for old, new in zip(past, (k, v), strict=True))
        out = attend(q, k, v, positions, self.layer.window)
        return self.o_proj(out.reshape(batch, length, c.num_heads * c.head_dim)), (k, v)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, window: int | None) -> jax.Array:
    """Causal attention of ``q [B, T, H, D]`` over ``k, v [B, S, KV, D]``, slot s holding position s.

    Args:
      positions: int32 ``[B, T]`` of the queries.
      window: see `LayerConfig`.

    Returns:
      ``[B, T, H, D]``.
    """
    batch, length, heads, dim = q.shape
    kv = k.shape[2]
    q = q.reshape(batch, length, kv, heads // kv, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k) * dim**-0.5
    ahead = positions[:, :, None] - jnp.arange(k.shape[1])
    seen = ahead >= 0
    if window is not None:
        seen &= ahead < window
    scores = jnp.where(seen[:, None, None], scores.astype(jnp.float32), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, length, heads, dim)


def _write(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Put ``new [B, T, ...]`` into ``old [B, S, ...]`` at each row's ``start [B]``."""
    return jax.vmap(lambda o, n, s: jax.lax.dynamic_update_slice_in_dim(o, n, s, axis=0))(old, new, start)


class MLP(nnx.Module):
    """Gated MLP: ``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(size, inner, use_bias=config.mlp_bias, rngs=rngs)
        self.up_proj = Linear(size, inner, use_bias=config.mlp_bias, rngs=rngs)
        self.down_proj = Linear(inner, size, use_bias=config.mlp_bias, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """Pre-norm block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        past: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """As `Attention.__call__`."""
        attended, kv = self.self_attn(self.input_layernorm(x), positions, angles, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class Embedding(nnx.Module):
    """Token embedding ``[vocab, hidden]``, also the output projection of tied models."""

    def __init__(self, vocab: int, size: int, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (vocab, size)) * size**-0.5)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embedding.get_value()[tokens]

    def attend(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("...d,vd->...v", x, self.embedding.get_value())


class Decoder(nnx.Module):
    """The whole model.

    Args:
      config: architecture.
      rngs: for the random initial weights (normally replaced by a checkpoint's).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs)
        self.layers = nnx.List([Layer(config, layer, rngs) for layer in config.layers])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tied:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of every position, without a cache.

        Args:
          tokens: int32 ``[B, T]``; rows may be padded on the right (causality keeps padding out).

        Returns:
          float32 ``[B, T, vocab]``.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.head(self.hidden(tokens, positions, None)[0])

    def hidden(self, tokens: jax.Array, positions: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache]:
        """Normalised last hidden states, and the cache with these tokens written into it.

        Args:
          tokens: int32 ``[B, T]``.
          positions: int32 ``[B, T]``, consecutive in each row; the tokens of row b go into the slots
            from ``positions[b, 0]``. Padding behind a row's end may repeat its last position.
          cache: what came before, or None to attend among these tokens only.

        Returns:
          ``[B, T, hidden]`` and the new cache.
        """
        x = self.embed_tokens(tokens)
        angles = rope.cos_sin(self.config.rope, self.config.head_dim, positions)
        keys, values = [], []
        for i, layer in enumerate(self.layers):
            past = None if cache is None else (cache.keys[i], cache.values[i])
            x, (k, v) = layer(x, positions, angles, past)
            keys.append(k)
            values.append(v)
        return self.norm(x), Cache(tuple(keys), tuple(values))

    def head(self, x: jax.Array) -> jax.Array:
        """Hidden states ``[..., hidden]`` to float32 logits ``[..., vocab]``."""
        logits = self.embed_tokens.attend(x) if self.config.tied else self.lm_head(x)
        return logits.astype(jnp.float32)
