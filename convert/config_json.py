"""What a ``config.json`` says to converters and decoder alike."""

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


QUANTIZATION = ("quantization_config", "quantization", "compression_config")
DECODERS = ("text_config", "llm_config", "language_config", "thinker_config")


def with_quantization_on_top(hf: HfConfig) -> JsonObject:
    """``hf`` with the quantization settings of the part that is the decoder, where the whole has none; nowhere else."""
    found = {k: hf[k] for k in QUANTIZATION if hf.get(k) is not None}
    for part in (p for k in DECODERS if isinstance(p := hf.get(k), Mapping)):
        inner = with_quantization_on_top(part)
        found = found or {k: inner[k] for k in QUANTIZATION if k in inner}
    return without_quantization(hf) | found


def without_quantization(hf: HfConfig) -> JsonObject:
    """``hf`` less the quantization settings of the whole and of all its parts."""
    return {
        k: without_quantization(v) if k.endswith("_config") and isinstance(v, Mapping) else v
        for k, v in hf.items()
        if k not in QUANTIZATION
    }


def flag(hf: HfConfig, key: str, absent: bool = False) -> bool:
    """A switch of the config: ``absent`` where it is not there, off where it is null.

    Raises:
      ConfigError: naming the key.
    """
    value = hf.get(key, absent)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} must be true or false; got {str(value)[:100]!r}")
    return bool(value)


def is_tied(hf: HfConfig) -> bool:
    """Whether the config says that the head is the embedding: the only place where that is read.

    A head that is stored and differs is one of its own whatever the config says: `awq_jax.convert.head.settle`
    makes the config of an opened checkpoint say so. `awq_jax.models.config.ModelConfig.tied` comes from here.

    Args:
      hf: of the whole model. Where the decoder is a part of it, the part says so where the whole does not.

    Raises:
      ConfigError: if it is said by something else than true or false.
    """
    thinker, text = hf.get("thinker_config"), hf.get("text_config")
    if isinstance(thinker, Mapping):  # Qwen2.5-Omni, the rest of which is carried through
        return is_tied(thinker)
    if isinstance(text, Mapping) and hf.get(TIED) is None:
        return hf.get("model_type") in TIED_BY_DEFAULT or is_tied(_text(hf, text))
    return flag(hf, TIED) if TIED in hf else hf.get("model_type") in TIED_BY_DEFAULT


def may_be_tied(hf: HfConfig) -> bool:
    """Whether the whole or a part says that the head is the embedding: so it is if no head is stored."""
    parts = [p for k in ("thinker_config", "text_config") if isinstance(p := hf.get(k), Mapping)]
    return is_tied(hf) or any(may_be_tied(_text(hf, p)) for p in parts)


def with_tied(hf: HfConfig, tied: bool) -> JsonObject:
    """``hf`` that says, in the whole and in its part, whether the head is the embedding."""
    thinker, text = hf.get("thinker_config"), hf.get("text_config")
    if isinstance(thinker, Mapping):
        return {**hf, "thinker_config": with_tied(thinker, tied)}
    return {**hf, TIED: tied, **({"text_config": with_tied(text, tied)} if isinstance(text, Mapping) else {})}


def _text(hf: HfConfig, part: HfConfig) -> JsonObject:
    return {**part, "model_type": part.get("model_type") or hf.get("model_type")}
