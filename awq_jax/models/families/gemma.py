"""Gemma: norms that store their scale less one, a scaled embedding, a head size of its own."""

from collections.abc import Mapping
from typing import Any

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base


def gemma_base(hf: HfConfig, attention: Mapping[str, object] | None = None, **changes: Any) -> ModelConfig:
    """What all Gemmas share."""
    activation = hf.get("hidden_activation") or hf.get("hidden_act") or "gelu"
    if activation == "gelu":  # the first release's configs mean the approximation by it
        activation = "gelu_pytorch_tanh"
    bias = bool(hf.get("attention_bias", False))
    fields: dict[str, object] = {"head_dim": hf.get("head_dim") or 256, "qkv_bias": bias, "o_bias": bias}
    return base(
        hf,
        attention=fields | dict(attention or {}),
        mlp={"activation": activation},
        norm={"offset": 1.0},
        embed_scale=float(hf["hidden_size"]) ** 0.5,
        **changes,
    )


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "gemma"."""
    return gemma_base(hf)
