"""Qwen2 and Qwen2.5: biases on q, k and v; optionally a sliding window from some layer on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awq_jax.models.config import LayerConfig, ModelConfig
from awq_jax.models.hf_config import base, required, windows


def layers(hf: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    """The window applies only if ``use_sliding_window`` is set."""
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    return tuple(LayerConfig(window=w) for w in windows(hf, required(hf, "num_hidden_layers"), window))


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """``model_type`` "qwen2"."""
    return base(hf, layers=layers(hf), qkv_bias=True)
