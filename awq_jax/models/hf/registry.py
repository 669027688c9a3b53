"""Which model families the reference decoder runs."""

import difflib
import re
from collections.abc import Mapping

from awq_jax.convert.config_json import HfConfig
from awq_jax.errors import AwqError, ConfigError, UnsupportedModelError
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import FAMILIES

ANY_MODEL = "Any Flax model can be quantized with awq_jax.quantize(params, batches, apply_fn=...)"
# Beginnings (endings) of the names of what is no decoder, where the config does not say.
ENCODER_DECODERS = ("t5", "mt5", "umt5", "bart", "mbart", "whisper", "pegasus", "marian", "m2m_100", "seamless")
RECURRENT = ("mamba", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm", "jamba", "zamba", "bamba", "nemotron_h")
ENCODERS = ("bert", "roberta", "electra", "deberta", "deberta-v2", "mpnet", "clip", "siglip", "vit", "wav2vec2")


def supported() -> tuple[str, ...]:
    """The ``model_type`` names that `awq_jax.load` accepts."""
    return tuple(FAMILIES)


def config_from_hf(hf: HfConfig) -> ModelConfig:
    """Content of a Hugging Face ``config.json`` to a `ModelConfig`.

    Raises:
      UnsupportedModelError: for a family, activation or rope scaling the decoder does not have.
      ConfigError: if a needed key is missing or contradicts another.
    """
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UnsupportedModelError(_refusal(hf, kind))
    try:
        return FAMILIES[kind](hf)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as e:
        if isinstance(e, AwqError):
            raise
        # Nothing vouches for the types of some fifty values that families look into.
        raise ConfigError(f"config.json: a value is not what a {kind} model has there: {type(e).__name__}: {e}") from e


def nearest(hf: HfConfig) -> str:
    """The supported family whose name is most like the model's type, its class, or its text part's type."""
    text = hf.get("text_config")
    if isinstance(text, Mapping) and text.get("model_type") in FAMILIES:
        return text["model_type"]
    classes = hf.get("architectures")
    names = [hf.get("model_type"), *(classes if isinstance(classes, list) else ())]
    plain = [re.sub(r"(For|Model|LMHead).*|[-_. ]", "", n)[:100].lower() for n in names if isinstance(n, str)]

    def likeness(family: str) -> tuple[int, float]:
        """A shared beginning of some letters counts most."""
        name = family.replace("_", "").lower()
        common = max((sum(name.startswith(n[: i + 1]) for i in range(len(n))) for n in plain), default=0)
        ratio = max((difflib.SequenceMatcher(None, n, name).ratio() for n in plain), default=0.0)
        return common if common > 3 else 0, ratio

    return max(FAMILIES, key=likeness)


def _refusal(hf: HfConfig, kind: object) -> str:
    """Why a model is not run, for the user to read."""
    if kind is None:
        return f"config.json has no model_type: fetch it again, or put the family there ({', '.join(FAMILIES)})"
    says = f"model_type {kind!r:.100} is not supported"
    name = kind if isinstance(kind, str) else ""
    if hf.get("is_encoder_decoder") is True or name.startswith(ENCODER_DECODERS):
        return f"{says}: it is an encoder with a decoder, and decoders alone are run. {ANY_MODEL}"
    if name.startswith(RECURRENT):
        return f"{says}: it is a state space or recurrent model, and models of attention are run. {ANY_MODEL}"
    if name.endswith(ENCODERS):
        return f"{says}: it is an encoder, which does not generate text. {ANY_MODEL}"
    senses = any(key in hf for key in ("vision_config", "audio_config", "visual", "img_processor"))
    what = " (it looks at images or hears, and this one's parts are not known)" if senses else ""
    return (
        f"{says}{what}; its nearest supported relative is {nearest(hf)!r} (all: {', '.join(FAMILIES)}). "
        f"docs/extending/family.md says how to add a family. {ANY_MODEL}"
    )
