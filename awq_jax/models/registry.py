"""Which model families the reference decoder runs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from awq_jax.errors import AwqError, ConfigError, UnsupportedModelError
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import FAMILIES


def supported() -> tuple[str, ...]:
    """The ``model_type`` names that `awq_jax.load` accepts."""
    return tuple(FAMILIES)


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Content of a Hugging Face ``config.json`` to a `ModelConfig`.

    Raises:
      UnsupportedModelError: for a family, activation or rope scaling the decoder does not have.
      ConfigError: if a needed key is missing or contradicts another.
    """
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, n=1, cutoff=0.0)[0]
        raise UnsupportedModelError(
            f"model_type {kind!r:.100} is not supported; its nearest supported relative is {near!r} "
            f"(all: {', '.join(FAMILIES)}). docs/adding-a-family.md says how to add a family; any other Flax model "
            "can be quantized with awq_jax.quantize(params, batches, apply_fn=...)"
        )
    try:
        return FAMILIES[kind](hf)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as e:
        if isinstance(e, AwqError):
            raise
        # Nothing vouches for the types of some fifty values that families look into.
        raise ConfigError(f"config.json: a value is not what a {kind} model has there: {type(e).__name__}: {e}") from e
