"""Helium 1: Llama with neighbouring channels rotated."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, norm_config
from awq_jax.models.hf.rope import rope_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "helium"."""
    return base(
        hf,
        attention={"head_dim": hf.get("head_dim") or 128, "qkv_bias": flag(hf, "attention_bias")},
        mlp={"bias": flag(hf, "mlp_bias")},
        norm=norm_config(hf, 1e-8),
        ropes=rope_config(hf, theta=100000.0, interleaved=True),
    )
