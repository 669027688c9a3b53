"""GLM-4 9B: half of a head rotated in neighbouring channels, fused gate and up."""

from typing import Any

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, norm_config
from awq_jax.models.hf.rope import rope_config


def config(hf: HfConfig, **fields: Any) -> ModelConfig:
    """``model_type`` "glm"; ``fields`` of `ModelConfig` that differ in its relatives."""
    hf = {"head_dim": 128, "num_key_value_heads": 2} | dict(hf)
    return base(
        hf,
        attention={"qkv_bias": flag(hf, "attention_bias", True)},
        mlp={"fused": True},
        norm=norm_config(hf, 1.5625e-7),
        ropes=rope_config(hf, fraction=0.5, interleaved=True),
        **fields,
    )
