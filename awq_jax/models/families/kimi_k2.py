"""Kimi K2: DeepSeek-V3 with more experts and fewer heads."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import deepseek_v3


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "kimi_k2"."""
    return deepseek_v3.config(hf)
