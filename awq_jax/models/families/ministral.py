"""Ministral 8B: Mistral with a window on some layers only."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, layer_types, windows


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "ministral"."""
    return base(hf, windows=windows(layer_types(hf, lambda i: True), hf.get("sliding_window", 4096)))
