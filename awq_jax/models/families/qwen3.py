"""Qwen3 (dense): Qwen2 with RMSNorm on each query and key head, and a head size of its own."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.families.qwen2 import qwen_windows
from awq_jax.models.hf.config import base, biases, norm_config


def attention(hf: HfConfig) -> dict[str, object]:
    """Fields of the attention of all Qwen3 models."""
    return biases(hf) | {"head_dim": hf.get("head_dim") or 128, "norm": norm_config(hf)}


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "qwen3"."""
    return base(hf, windows=qwen_windows(hf), attention=attention(hf))
