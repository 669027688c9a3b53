"""Seed-OSS: Llama with biases on q, k and v."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "seed_oss"."""
    return base(
        {"head_dim": 128} | dict(hf),
        attention={
            "qkv_bias": flag(hf, "attention_bias", True),
            "o_bias": flag(hf, "attention_out_bias"),
        },
        mlp={"bias": flag(hf, "mlp_bias")},
    )
