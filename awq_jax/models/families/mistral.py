"""Mistral: Llama with a sliding window on every layer."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "mistral"."""
    return base(hf, windows=hf.get("sliding_window", 4096))
