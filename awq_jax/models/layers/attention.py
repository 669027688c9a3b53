"""Softmax attention with a key/value cache."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from awq_jax.models.config import AttentionConfig, LayerConfig, RopeConfig
from awq_jax.models.layers import fused_columns, rope
from awq_jax.models.layers.cache import KeyValues, Tokens
from awq_jax.models.layers.linear import Linear
from awq_jax.models.layers.norm import Norm


@dataclasses.dataclass(frozen=True)
class Step:
    """What the layers share in one call.

    Attributes:
      positions: int32 ``[B, T]``.
      angles: cosines and sines for every `RopeConfig` of the model.
      decoding: one new token per row follows a cache.
      blocks: see `attend`.
    """

    positions: jax.Array
    angles: dict[RopeConfig, tuple[jax.Array, jax.Array]]
    decoding: bool = False
    blocks: jax.Array | None = None


class Attention(nnx.Module):
    """Grouped-query attention, driven by `AttentionConfig`."""

    def __init__(self, size: int, layer: LayerConfig, rngs: nnx.Rngs):
        c = layer.attention
        assert isinstance(c, AttentionConfig)
        inner, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        if c.fused:
            self.qkv_proj = Linear(size, inner + 2 * kv, use_bias=c.qkv_bias, rngs=rngs)
        else:
            self.q_proj = Linear(size, 2 * inner if c.gated else inner, use_bias=c.qkv_bias, rngs=rngs)
            self.k_proj = Linear(size, kv, use_bias=c.qkv_bias, rngs=rngs)
            self.v_proj = Linear(size, kv, use_bias=c.qkv_bias, rngs=rngs)
        self.o_proj = Linear(inner, size, use_bias=c.o_bias, rngs=rngs)
        if c.norm is not None:
            self.q_norm, self.k_norm = (Norm(c.norm, *_norm_shape(c, n)) for n in (c.heads, c.kv_heads))
        if c.sinks:
            self.sinks = nnx.Param(jnp.zeros(c.heads))
        self.layer, self.config = layer, c

    def __call__(self, x: jax.Array, step: Step, past: Tokens | None) -> tuple[jax.Array, Tokens]:
        """``x [B, T, hidden]`` -> the same shape, and this layer's keys and values."""
        c, turn = self.config, self.layer.rope
        q, k, v, gate = self.project(x)
        if turn is not None:
            cos, sin = step.angles[turn]
            q, k = rope.rotate(q, cos, sin, turn.interleaved), rope.rotate(k, cos, sin, turn.interleaved)
        if c.norm is not None and c.norm_rotated:
            q, k = self.q_norm(q), self.k_norm(k)
        if c.query_growth is not None:
            beta, length = c.query_growth
            growth = 1 + beta * jnp.log1p((step.positions // length).astype(jnp.float32))
            q = q * growth[..., None, None].astype(q.dtype)
        kept: Tokens = KeyValues(k, v) if past is None else past.written(k, v, step.positions[:, 0])
        out = None
        if x.shape[1] == 1 and step.blocks is None and c.cap is None and c.alibi is None and not c.sinks:
            out = kept.attended(q[:, 0], step.positions[:, 0], scale_of(c, q.shape[-1]), self.layer.window)
        if out is None:
            sinks = self.sinks.get_value() if c.sinks else None
            out = attend(q, kept.keys, kept.values, step.positions, c, self.layer.window, sinks, step.blocks)
        out = out.reshape(*x.shape[:-1], *out.shape[-2:])
        if gate is not None:
            out = out * jax.nn.sigmoid(gate)
        return self.o_proj(out.reshape(*x.shape[:-1], -1)), kept

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Normalised queries, keys, values, and gate ``[B, T, heads, head_dim]``, not yet rotated."""
        c = self.config
        gate = None
        lead, kv = x.shape[:-1], c.kv_heads * c.head_dim
        if c.fused:
            y = self.qkv_proj(x)
            if c.fused == "grouped":
                y = y.reshape(*lead, c.kv_heads, c.heads // c.kv_heads + 2, c.head_dim)
                q, k, v = y[..., :-2, :], y[..., -2, :], y[..., -1, :]
            else:
                q, k, v = fused_columns.split(y, (c.heads * c.head_dim, kv, kv), c.ways)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            if c.gated:
                q, gate = jnp.split(q.reshape(*lead, c.heads, 2 * c.head_dim), 2, axis=-1)
        if c.norm is not None and c.norm_over == "width":
            q = self.q_norm(q.reshape(*lead, c.heads * c.head_dim))
            k = self.k_norm(k.reshape(*lead, kv))
        q, k, v = (_clip(a, c) for a in (q, k, v))
        q = q.reshape(*lead, c.heads, c.head_dim)
        k, v = (a.reshape(*lead, c.kv_heads, c.head_dim) for a in (k, v))
        if c.norm is not None and c.norm_over != "width" and not c.norm_rotated:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v, gate


def _norm_shape(c: AttentionConfig, heads: int) -> tuple[int, ...]:
    return {"head": (c.head_dim,), "heads": (heads, c.head_dim), "width": (heads * c.head_dim,)}[c.norm_over]


def _clip(x: jax.Array, c: AttentionConfig) -> jax.Array:
    return x if c.clip is None else jnp.clip(x, -c.clip, c.clip)


def scale_of(c: AttentionConfig, dim: int) -> float:
    """Of scores of heads with ``dim`` channels."""
    return dim**-0.5 if c.scale is None else c.scale


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    c: AttentionConfig,
    window: int | None,
    sinks: jax.Array | None = None,
    blocks: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of ``q [B, T, H, D]`` over ``k [B, S, KV, D]``, slot s holding position s.

    Args:
      v: ``[B, S, KV, Dv]``.
      positions: int32 ``[B, T]`` of the queries.
      c: scale, cap and position bias of the scores.
      window: see `LayerConfig`.
      sinks: ``[H]``.
      blocks: int32 ``[B, T]``, of the T tokens from each row's first position: those with the same number of 0
        or more attend to each other in both directions. None for none.

    Returns:
      ``[B, T, H, Dv]``.
    """
    batch, length, heads, dim = q.shape
    kv = k.shape[2]
    scale = scale_of(c, dim)
    q = q.reshape(batch, length, kv, heads // kv, dim)
    scores = (jnp.einsum("btkgd,bskd->bkgts", q, k) * scale).astype(jnp.float32)
    if c.cap is not None:
        scores = c.cap * jnp.tanh(scores / c.cap)
    if c.alibi is not None:
        bias = alibi(heads, k.shape[1], c.alibi, c.alibi_max) * (scale if c.alibi_scaled else 1.0)
        scores = scores + bias.reshape(kv, heads // kv, 1, -1)
    ahead = positions[:, :, None] - jnp.arange(k.shape[1])
    seen = ahead >= 0
    if blocks is not None:
        at = jnp.arange(batch)[:, None], positions[:, :1] + jnp.arange(length)
        slots = jnp.full((batch, k.shape[1]), -1, blocks.dtype).at[at].set(blocks, mode="drop")
        seen |= (blocks[:, :, None] == slots[:, None]) & (blocks >= 0)[:, :, None]
    if window is not None:
        seen &= ahead < window
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(kv, -1, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, length, heads, v.shape[-1])


def alibi(heads: int, length: int, dtype: str, steepness: float = 8.0) -> jax.Array:
    """Slope of each head times the key's position, float32 ``[heads, length]``.

    Slopes are a geometric series from ``2 ** (-steepness / n)``, n being the power of two below ``heads``;
    further heads take every other member of the next finer series.
    """
    n = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-steepness * i / n) for i in range(1, n + 1)]
    slopes += [2 ** (-steepness * i / (2 * n)) for i in range(1, 2 * (heads - n), 2)]
    grid = jnp.asarray(slopes, dtype)[:, None] * jnp.arange(length).astype(dtype)
    return grid.astype(jnp.float32)
