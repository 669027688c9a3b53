"""Hugging Face's ``config.json`` to `ModelConfig`: what families share, and the spellings of its keys."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from awq_jax.convert.config_json import HfConfig, is_tied
from awq_jax.errors import ConfigError, UnsupportedModelError
from awq_jax.models.config import (
    AttentionConfig,
    DeltaConfig,
    LatentConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
)
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.layers.mlp import ACTIVATIONS, LEARNED

# What other families call Llama's keys; the first that is there counts.
SPELLINGS = {
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "hidden_act": ("hidden_activation", "activation_function", "activation"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
}

# Rope scalings in whose configs ``max_position_embeddings`` may be the length before the stretch, as in Qwen's READMEs.
STRETCHED = ("dynamic", "linear", "yarn")
LARGEST = {"num_hidden_layers": 4096}  # a plausible bound, before lists of that length are made

Family = Callable[[HfConfig], ModelConfig]


def get(hf: HfConfig, key: str, default: object = None) -> Any:
    """A value of the config under any of its `SPELLINGS`; ``default`` if it is absent or null."""
    for name in (key, *SPELLINGS.get(key, ())):
        if hf.get(name) is not None:
            return hf[name]
    return default


def required(hf: HfConfig, key: str) -> int:
    """A positive whole number from the config.

    Raises:
      ConfigError: naming the key.
    """
    value = get(hf, key)
    if type(value) is not int or not 0 < value <= LARGEST.get(key, 2**31):
        raise ConfigError(f"config.json: {key} must be a positive integer; got {repr(value)[:100]}")
    return value


def base(
    hf: HfConfig,
    *,
    attention: Mapping[str, object] | None = None,
    mlp: Mapping[str, object] | None = None,
    norm: Mapping[str, object] | None = None,
    mlps: Sequence[MLPConfig | MoEConfig] | None = None,
    mixers: Sequence[AttentionConfig | LatentConfig | DeltaConfig] | None = None,
    ropes: RopeConfig | Sequence[RopeConfig | None] | Literal["llama"] | None = "llama",
    windows: Sequence[int | None] | None = None,
    **fields: object,
) -> ModelConfig:
    """A Llama with changes.

    Args:
      hf: content of ``config.json``.
      attention, mlp, norm: fields of `AttentionConfig`, `MLPConfig`, `NormConfig` that differ.
      mlps: of each layer, if they are not alike.
      mixers: attention of each layer, if it is not alike or not `AttentionConfig`.
      ropes: of all layers, or of each; None for no rotation.
      windows: sliding window of each layer.
      **fields: of `ModelConfig`.

    Raises:
      ConfigError: if a required key is missing or sizes contradict each other.
      UnsupportedModelError: for an activation or rope scaling the decoder does not have.
    """
    count = required(hf, "num_hidden_layers")
    if ropes == "llama":
        ropes = rope_config(hf)
    each: list[RopeConfig | None] = [ropes] * count if ropes is None or isinstance(ropes, RopeConfig) else list(ropes)
    each_mixer = list(mixers) if mixers is not None else [attention_config(hf, **(attention or {}))] * count
    per_mlp = list(mlps) if mlps is not None else [mlp_config(hf, **(mlp or {}))] * count
    per_window = list(windows) if windows is not None else [None] * count
    layers = [LayerConfig(*t) for t in zip(each_mixer, per_mlp, each, per_window, strict=True)]
    length = required(hf, "max_position_embeddings")
    reach = [r.original_length * r.factor for r in each if r is not None and r.kind in STRETCHED]
    norms: dict[str, Any] = {"eps": float(get(hf, "norm_eps", 1e-6))}
    norms.update(norm or {})
    known: dict[str, Any] = {
        "family": hf["model_type"],
        "vocab_size": required(hf, "vocab_size"),
        "hidden_size": required(hf, "hidden_size"),
        "max_length": int(max([length, *reach])),
        "norm": NormConfig(**norms),
        "tied": is_tied(hf),
        "layers": tuple(layers),
    }
    known.update(fields)
    return ModelConfig(**known)


def attention_config(hf: HfConfig, **changes: object) -> AttentionConfig:
    """Llama's attention with changes.

    Raises:
      ConfigError: if the heads do not divide evenly.
    """
    heads = required(hf, "num_attention_heads")
    size = required(hf, "hidden_size")
    known: dict[str, Any] = {
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or size // heads,
    }
    known.update(changes)
    config = AttentionConfig(**known)
    whole = all(type(v) is int and v > 0 for v in (config.heads, config.kv_heads, config.head_dim))
    if not whole or config.heads % config.kv_heads or config.head_dim % 2:
        raise ConfigError(
            f"{config.heads} query heads over {config.kv_heads} key/value heads of {config.head_dim} "
            "channels: the heads must divide evenly and the channels be even; check config.json"
        )
    return config


def mlp_config(hf: HfConfig, **changes: object) -> MLPConfig:
    """Llama's MLP with changes.

    Raises:
      UnsupportedModelError: for an activation the decoder does not have.
    """
    fields: dict[str, Any] = dict(changes)
    if "size" not in fields:
        fields["size"] = required(hf, "intermediate_size")
    if "activation" not in fields:
        fields["activation"] = get(hf, "hidden_act", "silu")
    known = (*ACTIVATIONS, *(() if fields.get("gated", True) else LEARNED))
    if fields["activation"] not in known:
        raise UnsupportedModelError(
            f"hidden_act {fields['activation']!r} is not supported; the decoder has {', '.join(sorted(known))}"
        )
    return MLPConfig(**fields)


def predicting_layers(hf: HfConfig) -> str:
    """`Names.carried` for layers that predict the tokens after the next: they are numbered after the others."""
    count, more = required(hf, "num_hidden_layers"), get(hf, "num_nextn_predict_layers", 1)
    numbers = "|".join(str(count + i) for i in range(more if type(more) is int and 0 < more <= count else 1))
    return rf"^(model\.)?layers\.({numbers})\."


def layer_types(hf: HfConfig, default: Sequence[str] | None = None) -> list[str]:
    """``sliding_attention`` or ``full_attention`` for each layer.

    Args:
      hf: content of ``config.json``.
      default: where it does not say; None for full attention everywhere.

    Raises:
      UnsupportedModelError: for another kind of layer.
      ConfigError: if it does not list all layers.
    """
    count = required(hf, "num_hidden_layers")
    types = list(hf.get("layer_types") or default or ["full_attention"] * count)
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise UnsupportedModelError(f"layer_types {sorted(unknown)} are not supported")
    if len(types) < count:
        raise ConfigError(f"config.json: layer_types has {len(types)} entries for {count} layers")
    return types[:count]


def windows(types: Sequence[str], window: int | None) -> list[int | None]:
    """Sliding window of each layer, from its type."""
    return [window if t == "sliding_attention" else None for t in types]
