"""Aquila and Aquila 2: Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """``model_type`` "aquila"."""
    return base(hf)
