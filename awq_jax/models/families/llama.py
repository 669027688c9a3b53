"""Llama 2 and 3, and the checkpoints that use its architecture: TinyLlama, SmolLM2, Yi."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "llama"."""
    return base(hf, attention=biases(hf), mlp={"bias": flag(hf, "mlp_bias")})
