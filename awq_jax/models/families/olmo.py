"""OLMo: Llama with a LayerNorm that has no parameters, optionally with q, k and v clipped."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "olmo"."""
    bias = bool(hf.get("attention_bias", False))
    return base(
        hf,
        attention={"qkv_bias": bias, "o_bias": bias, "clip": hf.get("clip_qkv")},
        norm={"kind": "layer", "eps": 1e-5, "scale": False},
    )
