"""`ModelConfig`: everything the reference decoder needs to know about an architecture."""

from __future__ import annotations

import dataclasses
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding and how its frequencies are stretched (see `awq_jax.models.rope`).

    Attributes:
      kind: the scaling rule; the fields below it does not use keep their defaults.
      theta: base of the geometric series of wavelengths.
      factor: by how much the context is stretched.
      original_length: context length before stretching, in tokens.
      low_freq_factor, high_freq_factor: ``llama3``: wavelengths longer than
        ``original_length / low_freq_factor`` are stretched fully, those shorter than
        ``original_length / high_freq_factor`` not at all.
      beta_fast, beta_slow: ``yarn``: rotations over the original context between which to blend.
      truncate: ``yarn``: round the blend's ends to whole dimensions.
      attention_factor: ``yarn``: multiplies cosines and sines.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What may differ between the layers of one model.

    Attributes:
      window: a token attends to itself and the ``window - 1`` tokens before it; None for all.
      rope: rotate queries and keys.
    """

    window: int | None = None
    rope: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
      family: Hugging Face ``model_type``.
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width of the gated MLP.
      num_heads, num_kv_heads, head_dim: query heads, key/value heads (a divisor), channels of each.
      layers: one entry per layer.
      max_length: longest sequence the model was made for, in tokens.
      norm_eps: added to the mean square in RMSNorm.
      activation: name in `awq_jax.models.decoder.ACTIVATIONS`.
      rope: rotary embedding.
      qkv_bias, o_bias, mlp_bias: which linears have a bias.
      qk_norm: RMSNorm over the channels of each query and key head.
      tied: the output projection is the transposed embedding.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    max_length: int
    norm_eps: float = 1e-6
    activation: str = "silu"
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layers)
