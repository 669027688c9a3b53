"""Qwen2 and Qwen2.5: biases on q, k and v; optionally a sliding window from some layer on."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, layer_types, windows


def qwen_windows(hf: HfConfig) -> list[int | None]:
    """The window applies only if ``use_sliding_window`` is set."""
    window = hf.get("sliding_window", 4096) if flag(hf, "use_sliding_window") else None
    first = hf.get("max_window_layers", 28)
    return windows(layer_types(hf, lambda i: window is not None and i >= first), window)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "qwen2"."""
    return base(hf, windows=qwen_windows(hf), attention={"qkv_bias": True})
