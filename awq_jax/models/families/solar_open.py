"""Solar Open: Llama with DeepSeek-V3's experts in every layer."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.families.deepseek_v3 import NAMES, sigmoid_experts
from awq_jax.models.hf.config import base, norm_config
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.names import names


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "solar_open"."""
    return base(
        {"head_dim": 128} | dict(hf),
        attention={"qkv_bias": flag(hf, "attention_bias")},
        norm=norm_config(hf, 1e-5),
        mlps=sigmoid_experts(hf),
        ropes=rope_config(hf, theta=1e6),
        names=names(NAMES),
    )
