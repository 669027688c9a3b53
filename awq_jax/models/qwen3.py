"""Qwen3 (dense): Qwen2 with RMSNorm on each query and key head, and a head size of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awq_jax.models import qwen2
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf_config import base


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """``model_type`` "qwen3"."""
    bias = bool(hf.get("attention_bias", False))
    return base(
        hf,
        layers=qwen2.layers(hf),
        head_dim=hf.get("head_dim", 128),
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
    )
