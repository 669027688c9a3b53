"""Hugging Face's ``config.json`` to `ModelConfig`: what families share, and the spellings of its keys."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from awq_jax.convert.config_json import HfConfig, flag, is_tied
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
Mixer = AttentionConfig | LatentConfig | DeltaConfig
AnyMLP = MLPConfig | MoEConfig
T = TypeVar("T")


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
    norm: NormConfig | None = None,
    mlps: AnyMLP | Sequence[AnyMLP] | None = None,
    mixers: Mixer | Sequence[Mixer] | None = None,
    ropes: RopeConfig | Sequence[RopeConfig | None] | Literal["llama"] | None = "llama",
    windows: int | Sequence[int | None] | None = None,
    **fields: object,
) -> ModelConfig:
    """A Llama with changes.

    Args:
      hf: content of ``config.json``.
      attention, mlp: fields of `AttentionConfig` and `MLPConfig` that differ.
      norm: of the residual stream, if not `norm_config`'s.
      mlps: of all layers, or of each, if it is not an `MLPConfig` or they are not alike.
      mixers: attention of all layers, or of each, if it is not `AttentionConfig` or they are not alike.
      ropes: of all layers, or of each; None for no rotation.
      windows: sliding window of all layers, or of each; None for none.
      **fields: of `ModelConfig`.

    Raises:
      ConfigError: if a required key is missing or sizes contradict each other.
      UnsupportedModelError: for an activation or rope scaling the decoder does not have.
    """
    count = required(hf, "num_hidden_layers")

    def each(of: T | Sequence[T]) -> Sequence[T]:
        return of if isinstance(of, Sequence) else [of] * count

    each_mixer: Sequence[Mixer] = each(attention_config(hf, **(attention or {})) if mixers is None else mixers)
    each_mlp: Sequence[AnyMLP] = each(mlp_config(hf, **(mlp or {})) if mlps is None else mlps)
    each_rope = each(rope_config(hf) if ropes == "llama" else ropes)
    layers = [LayerConfig(*t) for t in zip(each_mixer, each_mlp, each_rope, each(windows), strict=True)]
    reach = [r.original_length * r.factor for r in each_rope if r is not None and r.kind in STRETCHED]
    known: dict[str, Any] = {
        "family": hf["model_type"],
        "vocab_size": required(hf, "vocab_size"),
        "hidden_size": required(hf, "hidden_size"),
        "max_length": int(max([required(hf, "max_position_embeddings"), *reach])),
        "norm": norm or norm_config(hf),
        "tied": is_tied(hf),
        "layers": tuple(layers),
    }
    return ModelConfig(**(known | fields))


def norm_config(hf: HfConfig, eps: float = 1e-6, **changes: object) -> NormConfig:
    """Llama's norm with changes; ``eps`` where the config does not say."""
    known: dict[str, Any] = {"eps": float(get(hf, "norm_eps", eps))}
    return NormConfig(**(known | changes))


def biases(hf: HfConfig, key: str = "attention_bias", default: bool = False) -> dict[str, object]:
    """Fields of `AttentionConfig`: all its linears have biases, or none has."""
    has = flag(hf, key, default)
    return {"qkv_bias": has, "o_bias": has}


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
    config = AttentionConfig(**(known | changes))
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
    fields: dict[str, Any] = {"activation": get(hf, "hidden_act", "silu")} | changes
    if "size" not in fields:
        fields["size"] = required(hf, "intermediate_size")
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


def plain_mlp(hf: HfConfig, activation: str, bias: bool = True, **changes: object) -> dict[str, object]:
    """Fields of `MLPConfig` without a gate; ``activation`` where the config does not say."""
    return {"gated": False, "bias": bias, "activation": get(hf, "hidden_act", activation)} | changes


def layer_types(hf: HfConfig, slides: Callable[[int], object] = lambda i: False) -> list[str]:
    """``sliding_attention`` or ``full_attention`` for each layer.

    Args:
      hf: content of ``config.json``.
      slides: whether the layer of a number has a window, where the config does not say.

    Raises:
      UnsupportedModelError: for another kind of layer.
      ConfigError: if it does not list all layers.
    """
    count = required(hf, "num_hidden_layers")
    default = ["sliding_attention" if slides(i) else "full_attention" for i in range(count)]
    types = list(hf.get("layer_types") or default)
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise UnsupportedModelError(f"layer_types {sorted(unknown)} are not supported")
    if len(types) < count:
        raise ConfigError(f"config.json: layer_types has {len(types)} entries for {count} layers")
    return types[:count]


def windows(types: Sequence[str], window: int | None) -> list[int | None]:
    """Sliding window of each layer, from its type."""
    return [window if t == "sliding_attention" else None for t in types]
