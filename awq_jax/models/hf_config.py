"""The part of a Hugging Face ``config.json`` that Llama's relatives share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast, get_args

from awq_jax.errors import ConfigError, UnsupportedModelError
from awq_jax.models.config import LayerConfig, ModelConfig, RopeConfig, RopeKind
from awq_jax.models.decoder import ACTIVATIONS


def base(hf: Mapping[str, Any], *, default_theta: float = 10000.0, **changes: Any) -> ModelConfig:
    """A `ModelConfig` with the fields all relatives name alike; ``changes`` override.

    Raises:
      ConfigError: if a required key is missing or sizes contradict each other.
      UnsupportedModelError: for an activation or rope scaling the decoder does not have.
    """
    heads = required(hf, "num_attention_heads")
    rope = rope_config(hf, default_theta)
    activation = hf.get("hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"hidden_act {activation!r} is not supported; the decoder has {', '.join(sorted(ACTIVATIONS))}"
        )
    max_length = required(hf, "max_position_embeddings")
    fields: dict[str, Any] = {
        "family": hf["model_type"],
        "vocab_size": required(hf, "vocab_size"),
        "hidden_size": required(hf, "hidden_size"),
        "intermediate_size": required(hf, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or required(hf, "hidden_size") // heads,
        "layers": (LayerConfig(),) * required(hf, "num_hidden_layers"),
        "max_length": int(max_length * rope.factor) if rope.kind == "dynamic" else max_length,
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "activation": activation,
        "rope": rope,
        "tied": bool(hf.get("tie_word_embeddings", False)),
    }
    config = ModelConfig(**(fields | changes))
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise ConfigError(
            f"{config.num_heads} query heads over {config.num_kv_heads} key/value heads of {config.head_dim} "
            "channels: the heads must divide evenly and the channels be even; check config.json"
        )
    return config


def required(hf: Mapping[str, Any], key: str) -> int:
    """A positive whole number from the config.

    Raises:
      ConfigError: naming the key.
    """
    value = hf.get(key)
    if not isinstance(value, int) or value <= 0:
        raise ConfigError(f"config.json: {key} must be a positive integer; got {value!r}")
    return value


def windows(hf: Mapping[str, Any], layers: int, window: int | None) -> tuple[int | None, ...]:
    """Sliding window of each layer from ``layer_types`` or Qwen's ``max_window_layers``."""
    types = hf.get("layer_types")
    if types is None:
        first = hf.get("max_window_layers", 28)
        types = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise UnsupportedModelError(f"layer_types {sorted(unknown)} are not supported")
    if len(types) < layers:
        raise ConfigError(f"config.json: layer_types has {len(types)} entries for {layers} layers")
    return tuple(window if t == "sliding_attention" else None for t in types[:layers])


def rope_config(hf: Mapping[str, Any], default_theta: float) -> RopeConfig:
    """Rope constants, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``.

    Raises:
      UnsupportedModelError: for an unknown scaling.
      ConfigError: if a constant it needs is missing.
    """
    data = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = data.get("rope_type") or data.get("type") or "default"
    theta = float(data.get("rope_theta") or hf.get("rope_theta") or default_theta)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind not in get_args(RopeKind):
        raise UnsupportedModelError(
            f"rope scaling {kind!r} is not supported; the decoder has {', '.join(get_args(RopeKind))}"
        )
    length = required(hf, "max_position_embeddings")
    original = length
    if kind != "dynamic":
        original = hf.get("original_max_position_embeddings") or data.get("original_max_position_embeddings") or length
    factor = data.get("factor")
    if factor is None and kind == "yarn":
        factor = length / original
    if factor is None:
        raise ConfigError(f"config.json: rope scaling {kind!r} needs a factor")
    extra: dict[str, Any] = {}
    if kind == "llama3":
        missing = {"low_freq_factor", "high_freq_factor"} - set(data)
        if missing:
            raise ConfigError(f"config.json: rope scaling 'llama3' needs {sorted(missing)}")
        extra = {k: float(data[k]) for k in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        extra = {
            "beta_fast": float(data.get("beta_fast") or 32),
            "beta_slow": float(data.get("beta_slow") or 1),
            "truncate": bool(data.get("truncate", True)),
            "attention_factor": _yarn_attention(data, factor),
        }
    return RopeConfig(
        kind=cast(RopeKind, kind), theta=theta, factor=float(factor), original_length=int(original), **extra
    )


def _yarn_attention(data: Mapping[str, Any], factor: float) -> float:
    """Temperature of the attention, folded into cosines and sines (arXiv 2309.00071, section 3.4)."""
    if data.get("attention_factor") is not None:
        return float(data["attention_factor"])

    def temperature(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if data.get("mscale") and data.get("mscale_all_dim"):
        return temperature(data["mscale"]) / temperature(data["mscale_all_dim"])
    return temperature(1.0)
