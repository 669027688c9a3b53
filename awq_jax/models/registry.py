"""Which model families the reference decoder runs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from awq_jax.errors import UnsupportedModelError
from awq_jax.models import llama, mistral, qwen2, qwen3, smollm3
from awq_jax.models.config import ModelConfig

FAMILIES: dict[str, Callable[[Mapping[str, Any]], ModelConfig]] = {
    "llama": llama.config,
    "mistral": mistral.config,
    "qwen2": qwen2.config,
    "qwen3": qwen3.config,
    "smollm3": smollm3.config,
}


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
    if kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, n=1, cutoff=0.0)[0]
        raise UnsupportedModelError(
            f"model_type {kind!r} is not supported; its nearest supported relative is {near!r} "
            f"(all: {', '.join(FAMILIES)}). docs/models.md says how to add a family; any other Flax model can be "
            "quantized with awq_jax.quantize(params, batches, apply_fn=...)"
        )
    return FAMILIES[kind](hf)
