"""InternLM3: Llama with a head size of its own and keys for its biases."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, norm_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "internlm3"."""
    bias = bool(hf.get("bias", hf.get("mlp_bias", False)))
    return base(
        hf,
        norm=norm_config(hf, 1e-5),
        attention={"qkv_bias": bool(hf.get("qkv_bias", hf.get("attention_bias", False))), "o_bias": bias},
        mlp={"bias": bias},
    )
