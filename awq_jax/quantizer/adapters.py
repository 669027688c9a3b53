"""Low-rank adapters: their factors are to be trained, so they stay float by themselves."""

import re

import jax
from flax import nnx

from awq_jax.paths import path_str

REASON = "a factor of a LoRA adapter"
# `lora_a` of flax.nnx, `w_lora_a` of tunix and qwix, `lora_kernel_a` of Keras, `lora_A/kernel`; `lora/a` of gemma.
_NAMES = re.compile(r"(^|[/_])lora_(\w+_)?[ab](/\w+){0,2}$|(^|/)lora(_\w+)?/[ab]$", re.IGNORECASE)


def factors(params: object) -> set[str]:
    """Paths of variables whose type is `flax.nnx.LoRAParam`, whatever their names."""
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, nnx.LoRAParam))[0]
    return {path_str(path) for path, x in flat if isinstance(x, nnx.LoRAParam)}


def is_named_factor(path: str) -> bool:
    """Whether a parameter is called as libraries call the factors of an adapter."""
    return _NAMES.search(path) is not None
