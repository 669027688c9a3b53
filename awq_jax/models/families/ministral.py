"""Ministral 8B: Mistral with a window on some layers only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, layer_types, required, windows


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """``model_type`` "ministral"."""
    types = layer_types(hf, ["sliding_attention"] * required(hf, "num_hidden_layers"))
    return base(hf, windows=windows(types, hf.get("sliding_window", 4096)))
