"""OLMo: Llama with a LayerNorm that has no parameters, optionally with q, k and v clipped."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig, NormConfig
from awq_jax.models.hf.config import base, biases


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "olmo"."""
    norm = NormConfig("layer", 1e-5, scale=False)
    return base(hf, attention=biases(hf) | {"clip": hf.get("clip_qkv")}, norm=norm)
