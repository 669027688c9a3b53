"""Ministral 8B: Mistral with a window on some layers only."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, layer_types, required, windows


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "ministral"."""
    types = layer_types(hf, ["sliding_attention"] * required(hf, "num_hidden_layers"))
    return base(hf, windows=windows(types, hf.get("sliding_window", 4096)))
