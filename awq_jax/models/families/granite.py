"""Granite: Llama with multipliers on the embedding, the scores, the residual stream and the logits."""

from typing import Any

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base


def granite_base(hf: HfConfig, **changes: Any) -> ModelConfig:
    """What all Granite models share; ``changes`` as `awq_jax.models.hf.config.base` takes them."""
    bias = bool(hf.get("attention_bias", False))
    return base(
        hf,
        attention={"qkv_bias": bias, "o_bias": bias, "scale": float(hf.get("attention_multiplier", 1.0))},
        mlp={"bias": bool(hf.get("mlp_bias", False))},
        embed_scale=float(hf.get("embedding_multiplier", 1.0)),
        residual_scale=float(hf.get("residual_multiplier", 1.0)),
        logit_scale=1 / float(hf.get("logits_scaling", 1.0)),
        **changes,
    )


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "granite"."""
    return granite_base(hf)
