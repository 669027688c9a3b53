"""The model families: one function each, from ``config.json`` to `awq_jax.models.config.ModelConfig`.

To add one, see docs/adding-a-family.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from awq_jax.models.config import ModelConfig
from awq_jax.models.families import (
    bloom,
    cohere,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    gptj,
    llama,
    mistral,
    mixtral,
    olmoe,
    opt,
    phi,
    phi3,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
)

FAMILIES: dict[str, Callable[[Mapping[str, Any]], ModelConfig]] = {
    "bloom": bloom.config,
    "cohere": cohere.config,
    "falcon": falcon.config,
    "gemma": gemma.config,
    "gemma2": gemma2.config,
    "gemma3_text": gemma3.config,
    "gpt2": gpt2.config,
    "gpt_neox": gpt_neox.config,
    "gptj": gptj.config,
    "llama": llama.config,
    "mistral": mistral.config,
    "mixtral": mixtral.config,
    "olmoe": olmoe.config,
    "opt": opt.config,
    "phi": phi.config,
    "phi3": phi3.config,
    "phimoe": phimoe.config,
    "qwen2": qwen2.config,
    "qwen2_moe": qwen2_moe.config,
    "qwen3": qwen3.config,
    "qwen3_moe": qwen3_moe.config,
    "smollm3": smollm3.config,
}
