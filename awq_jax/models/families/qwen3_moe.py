"""Qwen3 MoE: Qwen3 with experts, also in its Coder and Instruct releases."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.families.qwen2_moe import NAMES, qwen_mlps
from awq_jax.models.families.qwen3 import attention
from awq_jax.models.hf.config import base
from awq_jax.models.hf.moe import moe_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "qwen3_moe"."""
    window = hf.get("sliding_window") if flag(hf, "use_sliding_window") else None
    return base(
        hf,
        attention=attention(hf),
        mlps=qwen_mlps(hf, moe_config(hf)),
        windows=window,
        names=NAMES,
    )
