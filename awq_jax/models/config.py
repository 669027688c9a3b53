"""`ModelConfig`: everything the reference decoder needs to know about an architecture."""

import dataclasses
from typing import Literal

from awq_jax.models.names import LLAMA, Names
from awq_jax.models.vision.config import VisionConfig

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding and how its frequencies are stretched (see `awq_jax.models.layers.rope`).

    Attributes:
      kind: the scaling rule; the fields below it does not use keep their defaults.
      theta: base of the geometric series of wavelengths.
      dims: how many leading channels of a head are rotated; None for all.
      interleaved: channels ``(2i, 2i + 1)`` are a pair, instead of ``(i, i + dims / 2)``.
      factor: by how much the context is stretched.
      original_length: context length before stretching, in tokens.
      low_freq_factor, high_freq_factor: ``llama3``: wavelengths longer than
        ``original_length / low_freq_factor`` are stretched fully, those shorter than
        ``original_length / high_freq_factor`` not at all.
      beta_fast, beta_slow: ``yarn``: rotations over the original context between which to blend.
      truncate: ``yarn``: round the blend's ends to whole dimensions.
      short_factors, long_factors: ``longrope``: what each wavelength is multiplied by, for rows within
        the original context and for longer ones.
      attention_factor: ``yarn``, ``longrope``: multiplies cosines and sines.
      long_attention_factor: ``longrope``: the same for longer rows; None for the same number.
      sections: how many pairs turn by the frame, the row and the column of an image's token (text has
        its number in all three); empty if all turn by the token's number.
      alternating: pairs turn by frame, row and column in turn, instead of one section after another.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    dims: int | None = None
    interleaved: bool = False
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    long_attention_factor: float | None = None
    sections: tuple[int, ...] = ()
    alternating: bool = False


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """A normalisation over the last axis.

    Attributes:
      kind: ``rms`` divides by the root mean square; ``layer`` subtracts the mean first.
      eps: added to the mean square.
      scale, bias: which parameters it has.
      offset: the scale is ``offset + parameter`` (Gemma: 1).
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    scale: bool = True
    bias: bool = False
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention.

    Attributes:
      heads, kv_heads, head_dim: query heads, key/value heads (a divisor), channels of each.
      fused: one matrix makes queries, keys and values: ``concatenated`` as all q, all k, all v;
        ``grouped`` per key/value head as its q heads, its k, its v. None: three matrices.
      ways: ``concatenated`` in this many runs of columns (see `awq_jax.models.layers.fused_columns`).
      qkv_bias, o_bias: which linears have a bias.
      norm: of queries and keys; None for none.
      norm_rotated: they are normalised after they are rotated, instead of before.
      norm_over: ``head``: over the channels of a head, one scale for all heads; ``heads``: the same
        with a scale for each head; ``width``: over all heads together.
      scale: of the scores; None for ``head_dim ** -0.5``.
      cap: scores are ``cap * tanh(scores / cap)``.
      clip: queries, keys and values are clipped to ``[-clip, clip]``.
      gated: queries come with a gate as wide as they are, whose sigmoid multiplies what is attended to.
      sinks: a learned score per head takes part in the softmax and attends to nothing.
      alibi: scores grow with the key's position, by a slope per head (arXiv 2108.12409); the float
        type in which it is computed (it decides which positions can be told apart), None for none.
      alibi_scaled: the position's share is multiplied by the scale of the scores too.
      alibi_max: the gentlest slope is ``2 ** -alibi_max``.
      query_growth: ``(beta, length)``: the query at position p is multiplied by
        ``1 + beta * log(1 + p // length)``; None for no growth.
    """

    heads: int
    kv_heads: int
    head_dim: int
    fused: Literal["concatenated", "grouped"] | None = None
    ways: int = 1
    qkv_bias: bool = False
    o_bias: bool = False
    norm: NormConfig | None = None
    norm_over: Literal["head", "heads", "width"] = "head"
    norm_rotated: bool = False
    scale: float | None = None
    cap: float | None = None
    clip: float | None = None
    sinks: bool = False
    gated: bool = False
    alibi: Literal["float32", "bfloat16"] | None = None
    alibi_scaled: bool = False
    alibi_max: float = 8.0
    query_growth: tuple[float, int] | None = None


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Attention whose keys and values are made of a narrow latent (arXiv 2405.04434, section 2.1).

    Attributes:
      heads: of queries, keys and values.
      q_rank: width of the latent of the queries; None: they have none.
      kv_rank: width of the latent of keys and values.
      nope_dim, rope_dim: channels of a query or key that are not rotated and, after them, those that
        are; the rotated channels of the keys are the same for all heads.
      value_dim: channels of a value.
      bias: the linears into the latents and out of the attention have biases.
      eps: of the norms of the latents.
      scale: of the scores.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    bias: bool = False
    eps: float = 1e-6
    scale: float | None = None

    @property
    def head_dim(self) -> int:
        return self.nope_dim + self.rope_dim


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """A gated delta net (arXiv 2412.06464): linear attention with a state in place of keys and values.

    Attributes:
      key_heads, value_heads: of queries and keys, and of values (a multiple).
      key_dim, value_dim: channels of each.
      window: tokens that the convolution before the attention sees.
      eps: of the norm after it.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    window: int
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.key_dim


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` if not gated.

    Attributes:
      size: inner width.
      activation: name in `awq_jax.models.layers.mlp.ACTIVATIONS`.
      gated: there is a gate.
      fused: one matrix makes the gate and then the up half.
      ways: it does so in this many runs of columns (see `awq_jax.models.layers.fused_columns`).
      bias: the linears have biases.
      limit: the halves are clipped, the gate to at most ``limit`` and up to ``[-limit, limit]``, and
        multiplied as ``gate * sigmoid(steepness * gate) * (up + 1)``; None for the plain product.
      steepness: see ``limit``.
    """

    size: int
    activation: str = "silu"
    gated: bool = True
    fused: bool = False
    ways: int = 1
    bias: bool = False
    limit: float | None = None
    steepness: float = 1.0


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of an MLP (see `awq_jax.models.layers.moe`).

    Attributes:
      experts: how many.
      top_k: how many of them a token goes through.
      expert: each of them.
      shared: an MLP that every token goes through besides; None for none.
      shared_gate: it is multiplied by a sigmoid of its own linear of the token.
      normalize: the weights of a token's experts add up to 1.
      score: a token's weights are the ``softmax`` over all experts, the ``sigmoid`` of each expert's
        logit, or chosen one by one by ``sparsemixer`` (arXiv 2409.12136) with its ``jitter``.
      groups, top_groups: experts stand in groups (of experts) of equal size; only those of a token's best
        ``top_groups`` are chosen from. A group is as good as its ``group_best`` best experts together.
      correction: a bias per expert is added to the scores for the choice, but not to the weights; stored as
        ``[experts]``, or ``"row"`` as ``[1, experts]``.
      scale: multiplies the weights.
      router_bias: the router has a bias.
    """

    experts: int
    top_k: int
    expert: MLPConfig
    shared: MLPConfig | None = None
    shared_gate: bool = False
    normalize: bool = True
    score: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    jitter: float = 0.0
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    correction: bool | Literal["row"] = False
    scale: float = 1.0
    router_bias: bool = False


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One layer.

    Attributes:
      attention, mlp: its two halves.
      rope: rotates queries and keys; None if they are not rotated.
      window: a token attends to itself and the ``window - 1`` tokens before it; None for all.
    """

    attention: AttentionConfig | LatentConfig | DeltaConfig
    mlp: MLPConfig | MoEConfig
    rope: RopeConfig | None = None
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
      family: Hugging Face ``model_type``.
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      layers: one entry per layer.
      max_length: longest sequence the model was made for, in tokens, as stretched by a scaling of the rope.
      norm: of the residual stream.
      norms: where it stands: ``pre`` before attention and MLP, ``post`` after each and before the
        sum, ``sandwich`` both, ``residual`` after each sum.
      parallel: attention and MLP read the same residual stream and are added together; ``one`` norm
        for both, or ``two``. None: one after the other.
      final_norm: the last hidden states are normalised.
      embed_norm: the embedding is normalised.
      embed_scale, residual_scale, logit_scale: multiply the embedding, what each half of a layer adds
        to the residual stream, and the logits.
      logit_cap: logits are ``cap * tanh(logits / cap)``.
      positions: rows of a learned absolute position embedding; None for none.
      position_offset: row of the first position.
      embed_size: width of the token embedding, projected to and from ``hidden_size``; None: the same.
      tied: the output projection is the transposed embedding (see `awq_jax.convert.config_json.is_tied`).
      head_bias: the output projection has a bias.
      head_norm: the weights of each logit are divided by their length (a head of its own, without bias).
      names: what the checkpoint calls its tensors.
      other_names: other names that checkpoints of the family have; one is written as it was read.
      vision: looks at images; None for a model of text.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    max_length: int
    norm: NormConfig = NormConfig()
    norms: Literal["pre", "post", "sandwich", "residual"] = "pre"
    parallel: Literal["one", "two"] | None = None
    final_norm: bool = True
    embed_norm: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    positions: int | None = None
    position_offset: int = 0
    embed_size: int | None = None
    tied: bool = False
    head_bias: bool = False
    head_norm: bool = False
    names: Names = LLAMA
    other_names: tuple[Names, ...] = ()
    vision: VisionConfig | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)
