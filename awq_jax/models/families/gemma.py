"""Gemma: norms that store their scale less one, a scaled embedding, a head size of its own."""

from collections.abc import Mapping
from typing import Any

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases, norm_config


def config(hf: HfConfig, attention: Mapping[str, object] | None = None, **changes: Any) -> ModelConfig:
    """``model_type`` "gemma"; ``attention`` and ``changes`` are arguments of `base` that differ in its relatives."""
    activation = hf.get("hidden_activation") or hf.get("hidden_act") or "gelu"
    if activation == "gelu":  # the first release's configs mean the approximation by it
        activation = "gelu_pytorch_tanh"
    return base(
        hf,
        attention={"head_dim": hf.get("head_dim") or 256, **biases(hf), **(attention or {})},
        mlp={"activation": activation},
        norm=norm_config(hf, offset=1.0),
        embed_scale=float(hf["hidden_size"]) ** 0.5,
        **changes,
    )
