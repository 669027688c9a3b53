"""The reference decoder: a plain Flax NNX transformer, driven by `ModelConfig`.

Layers are unrolled (a scan would copy each layer's packed weights before a custom call) and no
module transform is used: split the state, call under `jax.jit`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from awq_jax import nnx as nnx_layers
from awq_jax.models.config import (
    AttentionConfig,
    DeltaConfig,
    LatentConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)
from awq_jax.models.layers import rope
from awq_jax.models.layers.attention import Attention, Step
from awq_jax.models.layers.cache import Cache, Past
from awq_jax.models.layers.delta_net import GatedDeltaNet
from awq_jax.models.layers.latent_attention import LatentAttention
from awq_jax.models.layers.linear import Linear
from awq_jax.models.layers.mlp import MLP
from awq_jax.models.layers.moe import MoE
from awq_jax.models.layers.norm import Norm
from awq_jax.models.vision import towers
from awq_jax.qtensor import QuantizedTensor

Mixer = Callable[..., tuple[jax.Array, Past]]
MIXERS: dict[type, Callable[[int, LayerConfig, nnx.Rngs], Mixer]] = {
    AttentionConfig: Attention,
    LatentConfig: LatentAttention,
    DeltaConfig: GatedDeltaNet,
}


class Layer(nnx.Module):
    """Attention and MLP, each added to the residual stream; norms where `ModelConfig.norms` says.

    ``input_layernorm`` and ``post_attention_layernorm`` stand before attention and MLP (``residual``:
    after their sums), ``attention_output_layernorm`` and ``mlp_output_layernorm`` after them.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, rngs: nnx.Rngs):
        c, size = config, config.hidden_size
        if c.norms != "post":
            self.input_layernorm = Norm(c.norm, size)
            if c.parallel != "one":
                self.post_attention_layernorm = Norm(c.norm, size)
        if c.norms in ("post", "sandwich"):
            self.attention_output_layernorm = Norm(c.norm, size)
            self.mlp_output_layernorm = Norm(c.norm, size)
        self.self_attn = MIXERS[type(layer.attention)](size, layer, rngs)
        self.mlp = MoE(size, layer.mlp, rngs) if isinstance(layer.mlp, MoEConfig) else MLP(size, layer.mlp, rngs)
        self.config = config

    def __call__(self, x: jax.Array, step: Step, past: Past | None) -> tuple[jax.Array, Past]:
        """``x [B, T, hidden]`` to the same shape, and what the layer keeps; ``past`` is what it kept, or None."""
        c = self.config
        pre, post = c.norms in ("pre", "sandwich"), c.norms in ("post", "sandwich")
        h = self.input_layernorm(x) if pre else x
        attended, kv = self.self_attn(h, step, past)
        if c.parallel:
            if c.parallel == "two":
                h = self.post_attention_layernorm(x)
            return x + (attended + self._mlp(h, step)) * c.residual_scale, kv
        if post:
            attended = self.attention_output_layernorm(attended)
        x = x + attended * c.residual_scale
        if c.norms == "residual":
            x = self.input_layernorm(x)
        out = self._mlp(self.post_attention_layernorm(x) if pre else x, step)
        if post:
            out = self.mlp_output_layernorm(out)
        x = x + out * c.residual_scale
        return self.post_attention_layernorm(x) if c.norms == "residual" else x, kv

    def _mlp(self, x: jax.Array, step: Step) -> jax.Array:
        return self.mlp(x, step.decoding) if isinstance(self.mlp, MoE) else self.mlp(x)


Call = Callable[[Layer, jax.Array, Step, Past | None], tuple[jax.Array, Past]]


def ropes(config: ModelConfig) -> dict[RopeConfig, int]:
    """The rotations that layers ask for, each with the size of a head."""
    return {layer.rope: layer.attention.head_dim for layer in config.layers if layer.rope is not None}


class Begun(NamedTuple):
    """What the layers read.

    Attributes:
      embedded: ``[B, T, hidden]``: what the first one reads.
      angles: cosines and sines for each of `ropes`.
      blocks, deep, shift: see `awq_jax.models.vision.towers.Seen`.
    """

    embedded: jax.Array
    angles: tuple[tuple[jax.Array, jax.Array], ...]
    blocks: jax.Array | None
    deep: tuple[jax.Array, ...]
    shift: jax.Array | None

    def step(self, config: ModelConfig, positions: jax.Array, decoding: bool) -> Step:
        """What the layers share."""
        return Step(positions, dict(zip(ropes(config), self.angles, strict=True)), decoding, self.blocks)


class Embedding(nnx.Module):
    """Embedding ``[rows, size]``; that of the tokens is also the output projection of tied models."""

    def __init__(self, rows: int, size: int, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (rows, size)) * size**-0.5)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding.get_value()[ids]

    def attend(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("...d,vd->...v", x, self.embedding.get_value())


class Decoder(nnx.Module):
    """The whole model.

    Args:
      config: architecture.
      rngs: for the random initial weights (normally replaced by a checkpoint's).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, size = config, config.hidden_size
        embed = c.embed_size or size
        self.config = config
        self.embed_tokens = Embedding(c.vocab_size, embed, rngs)
        if embed != size:
            self.project_in = Linear(embed, size, use_bias=False, rngs=rngs)
            self.project_out = Linear(size, embed, use_bias=False, rngs=rngs)
        if c.positions is not None:
            self.embed_positions = Embedding(c.positions, size, rngs)
        if c.embed_norm:
            self.embed_norm = Norm(c.norm, size)
        self.layers = nnx.List([Layer(config, layer, rngs) for layer in config.layers])
        if c.final_norm:
            self.norm = Norm(c.norm, size)
        if not c.tied:
            self.lm_head = nnx_layers.Linear(embed, c.vocab_size, use_bias=c.head_bias, rngs=rngs)
        if c.vision is not None:
            self.vision = towers.TOWERS[type(c.vision)](c.vision, size, rngs)

    def __call__(self, tokens: jax.Array, *, call: Call = Layer.__call__, **images: jax.Array) -> jax.Array:
        """Logits of every position, without a cache.

        Args:
          tokens: int32 ``[B, T]``; rows may be padded on the right (causality keeps padding out).
          call: calls a layer.
          **images: what else a processor returned (see `awq_jax.models.vision.towers.pictures`).

        Returns:
          float32 ``[B, T, vocab]``.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.head(self.hidden(tokens, positions, None, towers.pictures(self.config.vision, images), call)[0])

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Cache | None,
        images: Mapping[str, jax.Array] | towers.Looked | None = None,
        call: Call = Layer.__call__,
    ) -> tuple[jax.Array, Cache]:
        """Normalised last hidden states, and the cache with these tokens written into it.

        Args:
          tokens: int32 ``[B, T]``.
          positions: int32 ``[B, T]``, consecutive in each row; the tokens of row b go into the slots
            from ``positions[b, 0]``. Padding after a row's end may repeat its last position.
          cache: what came before, or None to attend among these tokens only.
          images: those that the tokens stand for, in a call in which positions begin at 0; or what a tower has
            made of them.
          call: calls a layer.

        Returns:
          ``[B, T, hidden]`` and the new cache.
        """
        begun = self.begin(tokens, positions, None if cache is None else cache.shift, images)
        x, step = begun.embedded, begun.step(self.config, positions, cache is not None and tokens.shape[1] == 1)
        kept = []
        for i, layer in enumerate(self.layers):
            x, own = call(layer, x, step, None if cache is None else cache.layers[i])
            x = x + begun.deep[i] if i < len(begun.deep) else x
            kept.append(own)
        return self.end(x), Cache(tuple(kept), begun.shift)

    def begin(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        shift: jax.Array | None,
        images: Mapping[str, jax.Array] | towers.Looked | None = None,
    ) -> Begun:
        """What the layers read, for `hidden`; ``shift``: that of the cache, if there is one."""
        seen = self.look(tokens, positions, images)
        shift = seen.shift if shift is None else shift
        turns = seen.turns
        if turns is None:
            turns = positions if shift is None else positions + shift[:, None]
        angles = tuple(rope.cos_sin(turn, dim, turns) for turn, dim in ropes(self.config).items())
        return Begun(seen.embedded, angles, seen.blocks, seen.deep, shift)

    def end(self, x: jax.Array) -> jax.Array:
        """What the last layer left, normalised."""
        return self.norm(x) if self.config.final_norm else x

    def look(
        self, tokens: jax.Array, positions: jax.Array, images: Mapping[str, jax.Array] | towers.Looked | None
    ) -> towers.Seen:
        """What the first layer reads, and what else images change."""
        vision = self.config.vision
        if vision is None or not images:
            return towers.Seen(self.embed(tokens, positions))
        # The token of an image may lie outside of the vocabulary.
        text = self.embed(jnp.where(tokens == vision.token, 0, tokens), positions)
        return towers.look(vision, self.vision, tokens, text, images)

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """What the first layer reads, ``[B, T, hidden]``."""
        c = self.config
        x = self.embed_tokens(tokens)
        if c.embed_scale != 1.0:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        if c.embed_size not in (None, c.hidden_size):
            x = self.project_in(x)
        if c.positions is not None:
            x = x + self.embed_positions(positions + c.position_offset).astype(x.dtype)
        return self.embed_norm(x) if c.embed_norm else x

    def head(self, x: jax.Array) -> jax.Array:
        """Hidden states ``[..., hidden]`` to float32 logits ``[..., vocab]``."""
        c = self.config
        if c.embed_size not in (None, c.hidden_size):
            x = self.project_out(x)
        logits = self.embed_tokens.attend(x) if c.tied else self.lm_head(x)
        logits = logits.astype(jnp.float32) * c.logit_scale
        if c.head_norm:
            kernel = self.lm_head.kernel.get_value()
            kernel = kernel.dequantize() if isinstance(kernel, QuantizedTensor) else kernel
            logits = logits / jnp.linalg.norm(kernel.astype(jnp.float32), axis=0)
        return logits if c.logit_cap is None else c.logit_cap * jnp.tanh(logits / c.logit_cap)
