"""Nested ``config.json`` of models that look at images: text part, towers, and the names of tensors."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from awq_jax.convert.config_json import TIED, HfConfig, is_tied
from awq_jax.errors import ConfigError, UnsupportedModelError
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import Family, required
from awq_jax.models.layers.mlp import ACTIVATIONS
from awq_jax.models.names import Names
from awq_jax.models.vision.config import ViTConfig

# What transformers takes where a nested config is silent, which many published ones are.
TEXT: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "mistral": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6}
    | {"sliding_window": 4096},
    "qwen2": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6},
    "gemma3_text": {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072}
    | {"rms_norm_eps": 1e-6},
}
VITS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 224}
    | {"num_attention_heads": 12, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 224}
    | {"num_attention_heads": 12, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
MLP = {"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}  # ours: theirs, in a tower's layer
# Of a tower, but not needed for its features.
UNUSED = r"(^|\.)vision_tower\.(vision_model\.)?(head\.|embeddings\.position_ids$)"


class NameFields(TypedDict):
    """Fields of `ModelConfig`."""

    names: Names
    other_names: tuple[Names, ...]


def part(hf: HfConfig, key: str, needed: bool = True) -> dict[str, Any]:
    """A nested config; empty if it is absent and not ``needed``.

    Raises:
      ConfigError: if it is no table, or absent.
    """
    value = hf.get(key)
    if value is None and not needed:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {key} must be a table of settings; got {str(value)[:100]!r}")
    return dict(value)


def text_config(hf: HfConfig, text: HfConfig, families: Mapping[str, Family], default: str) -> ModelConfig:
    """The decoder of a nested config, under the whole model's name.

    Args:
      hf: the whole.
      text: its part on text.
      families: of decoders, by ``model_type``.
      default: ``model_type`` where it does not say.

    Raises:
      UnsupportedModelError: for a decoder that is not one of ``families``.
    """
    kind = text.get("model_type") or default
    if kind not in families:
        raise UnsupportedModelError(
            f"a {hf['model_type']} model around a {str(kind)[:100]!r} decoder is not supported; it may be "
            f"{', '.join(families)}"
        )
    whole = TEXT.get(kind, {}) | dict(text) | {"model_type": kind}
    whole[TIED] = is_tied({**hf, "text_config": whole})
    return dataclasses.replace(families[kind](whole), family=hf["model_type"])


def vit_config(hf: HfConfig) -> ViTConfig:
    """``vision_config`` of a CLIP or SigLIP tower.

    Raises:
      UnsupportedModelError: for another tower or activation.
      ConfigError: if sizes do not fit.
    """
    found = part(hf, "vision_config")
    kind = found.get("model_type", "clip_vision_model")
    if kind not in VITS:
        raise UnsupportedModelError(
            f"a {hf['model_type']} model with a {str(kind)[:100]!r} tower is not supported; it may be {', '.join(VITS)}"
        )
    v = VITS[kind] | {k: x for k, x in found.items() if x is not None}
    config = ViTConfig(
        size=required(v, "hidden_size"),
        layers=required(v, "num_hidden_layers"),
        heads=required(v, "num_attention_heads"),
        mlp=required(v, "intermediate_size"),
        image=required(v, "image_size"),
        patch=required(v, "patch_size"),
        channels=required({"num_channels": 3} | v, "num_channels"),
        activation=activation(v["hidden_act"]),
        eps=float(v["layer_norm_eps"]),
        class_token=kind == "clip_vision_model",
    )
    if config.size % config.heads or config.patch > config.image:
        raise ConfigError(
            f"config.json: a tower of {config.size} channels, {config.heads} heads, patches of {config.patch} pixels "
            f"and pictures of {config.image} does not divide evenly"
        )
    return config


def activation(name: object) -> str:
    """A tower's or projector's activation.

    Raises:
      UnsupportedModelError: if the decoder does not have it.
    """
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"activation {str(name)[:100]!r} is not supported; known are {sorted(ACTIVATIONS)}")
    return str(name)


def image_token(hf: HfConfig, default: int) -> int:
    """Id of the token that stands for a feature of an image.

    Raises:
      ConfigError: if it is no whole number.
    """
    value = next((hf[k] for k in ("image_token_id", "image_token_index") if hf.get(k) is not None), default)
    if type(value) is not int or value < 0:
        raise ConfigError(f"config.json: image_token_id must be a whole number; got {str(value)[:100]!r}")
    return value


def name_fields(text: Names, places: Sequence[tuple[str, str, Mapping[str, str]]], carried: str = "") -> NameFields:
    """The names of all tensors, for each way of nesting them, the usual one first.

    Args:
      text: names of the decoder as a model of its own.
      places: ``(decoder, head, others)`` of each way: the beginning of the decoder's names
        (``"language_model.model"``), the name of its head, and entries for the tower.
      carried: see `Names.carried`.
    """
    top = ("layers", "embed_tokens", "norm")
    all_names = [
        dataclasses.replace(
            text,
            entries=(*text.entries, *((m, f"{decoder}.{m}") for m in top), ("lm_head", head), *others.items()),
            carried="|".join(filter(None, (text.carried, carried))),
        )
        for decoder, head, others in places
    ]
    return NameFields(names=all_names[0], other_names=tuple(all_names[1:]))


def vit_places(layers: int, others: Mapping[str, str]) -> list[tuple[str, str, dict[str, str]]]:
    """For `name_fields`: LLaVA's and Gemma 3's ways, published and since transformers 4.52; the tower has two names.

    Args:
      layers: of the tower.
      others: entries for what stands beside the tower.
    """
    out = []
    for decoder, head, before in (
        ("language_model.model", "language_model.lm_head", ""),
        ("model.language_model", "lm_head", "model."),
    ):
        for tower in ("vision_tower.vision_model", "vision_tower"):
            at = before + tower
            entries = {"vision.tower": at, "vision.tower.layers": f"{at}.encoder.layers"}
            entries["vision.tower.pre_layernorm"] = f"{at}.pre_layrnorm"
            entries |= per_layer("vision.tower.layers", f"{at}.encoder.layers", layers, MLP)
            out.append((decoder, head, entries | {k: before + v for k, v in others.items()}))
    return out


def per_layer(ours: str, theirs: str, layers: int, entries: Mapping[str, str]) -> dict[str, str]:
    """``entries`` for each of a tower's layers."""
    return {f"{ours}.{i}.{k}": f"{theirs}.{i}.{v}" for i in range(layers) for k, v in entries.items()}
