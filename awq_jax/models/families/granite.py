"""Granite: Llama with multipliers on the embedding, the scores, the residual stream and the logits."""

from typing import Any

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases


def config(hf: HfConfig, **changes: Any) -> ModelConfig:
    """``model_type`` "granite"; ``changes`` are arguments of `base` that differ in its relatives."""
    return base(
        hf,
        attention=biases(hf) | {"scale": float(hf.get("attention_multiplier", 1.0))},
        mlp={"bias": flag(hf, "mlp_bias")},
        embed_scale=float(hf.get("embedding_multiplier", 1.0)),
        residual_scale=float(hf.get("residual_multiplier", 1.0)),
        logit_scale=1 / float(hf.get("logits_scaling", 1.0)),
        **changes,
    )
