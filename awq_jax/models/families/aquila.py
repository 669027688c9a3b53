"""Aquila and Aquila 2: Llama."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "aquila"."""
    return base(hf)
