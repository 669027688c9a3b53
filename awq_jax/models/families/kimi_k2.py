"""Kimi K2: DeepSeek-V3 with more experts and fewer heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awq_jax.models.config import ModelConfig
from awq_jax.models.families import deepseek_v3


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """``model_type`` "kimi_k2"."""
    return deepseek_v3.config(hf)
