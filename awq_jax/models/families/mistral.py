"""Mistral: Llama with a sliding window on every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, required


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """``model_type`` "mistral"."""
    return base(hf, windows=[hf.get("sliding_window", 4096)] * required(hf, "num_hidden_layers"))
