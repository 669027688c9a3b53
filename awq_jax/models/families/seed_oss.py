"""Seed-OSS: Llama with biases on q, k and v."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "seed_oss"."""
    return base(
        {"head_dim": 128} | dict(hf),
        attention={
            "qkv_bias": bool(hf.get("attention_bias", True)),
            "o_bias": bool(hf.get("attention_out_bias", False)),
        },
        mlp={"bias": bool(hf.get("mlp_bias", False))},
    )
