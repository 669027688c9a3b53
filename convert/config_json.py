"""What a ``config.json`` says to converters and decoder alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awq_jax.errors import ConfigError

HfConfig = Mapping[str, Any]
"""Content of a Hugging Face ``config.json``, or of a table in it: values of JSON, which nothing vouches for."""
JsonObject = dict[str, Any]
"""The same where it is our own: just read, or made to be written."""

TIED = "tie_word_embeddings"
# By ``model_type``: families whose configs may leave `TIED` out and mean true, as their classes have it.
TIED_BY_DEFAULT = frozenset((
    "RefinedWeb", "RefinedWebModel", "bloom", "cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "exaone", "falcon",
    "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_bigcode", "minicpm", "minicpm3", "mpt", "opt", "smollm3",
    "starcoder2", "vaultgemma",
))  # fmt: skip


def flag(hf: HfConfig, key: str) -> bool:
    """A switch of the config, off if it is absent or null.

    Raises:
      ConfigError: naming the key.
    """
    value = hf.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} must be true or false; got {str(value)[:100]!r}")
    return bool(value)


def is_tied(hf: HfConfig) -> bool:
    """Whether the head is the embedding: the only place where that is decided.

    `awq_jax.models.config.ModelConfig.tied` comes from here; writers that must not store such a head ask here.

    Args:
      hf: of the whole model. Where the decoder is a part of it, whole or part may say so.

    Raises:
      ConfigError: if it is said by something else than true or false.
    """
    thinker, text = hf.get("thinker_config"), hf.get("text_config")
    if isinstance(thinker, Mapping):  # Qwen2.5-Omni, the rest of which is carried through
        return is_tied(thinker)
    if isinstance(text, Mapping):
        kind = text.get("model_type") or hf.get("model_type")
        return flag(hf, TIED) or is_tied({**text, "model_type": kind})
    return flag(hf, TIED) if TIED in hf else hf.get("model_type") in TIED_BY_DEFAULT
