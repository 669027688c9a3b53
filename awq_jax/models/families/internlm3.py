"""InternLM3: Llama with a head size of its own and keys for its biases."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, norm_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "internlm3"."""
    bias = flag(hf, "bias" if "bias" in hf else "mlp_bias")
    return base(
        hf,
        norm=norm_config(hf, 1e-5),
        attention={"qkv_bias": flag(hf, "qkv_bias" if "qkv_bias" in hf else "attention_bias"), "o_bias": bias},
        mlp={"bias": bias},
    )
