"""Qwen2-VL: Qwen2 that looks at images of any size; tokens turn by frame, row and column"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from awq_jax.convert.config_json import HfConfig
from awq_jax.errors import ConfigError, UnsupportedModelError
from awq_jax.models.config import ModelConfig, RopeConfig
from awq_jax.models.families import qwen2
from awq_jax.models.hf.config import required
from awq_jax.models.vision import hf as nested
from awq_jax.models.vision.config import QwenVision

SIZES: dict[str, Any] = {
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
MERGER = {"norm": "ln_q", "fc1": "mlp.0", "fc2": "mlp.2"}
# Of a decoder, for which a flat config has its keys beside those of the whole.
TEXT_KEYS = {"model_type", "vision_config", "text_config", "quantization_config"}


def text_part(hf: HfConfig) -> dict[str, Any]:
    """The decoder's settings, which stand beside the tower's in the first releases."""
    return nested.part(hf, "text_config", needed=False) or {k: v for k, v in hf.items() if k not in TEXT_KEYS}


def decoder(hf: HfConfig, text: HfConfig) -> ModelConfig:
    """Qwen2 whose tokens turn by frame, row and column."""
    text = {"rope_theta": 1e6, "model_type": None} | dict(text)
    found = nested.text_config(hf, text | {"model_type": "qwen2"}, {"qwen2": qwen2.config}, "qwen2")
    return with_sections(found, text, [16, 24, 24])


def with_sections(found: ModelConfig, text: HfConfig, default: list[int], alternating: bool = False) -> ModelConfig:
    """``found`` with the sections of its rope.

    Raises:
      UnsupportedModelError: for a rope scaling that has none.
      ConfigError: if they are not as many as there are pairs of channels.
    """
    data = text.get("rope_scaling") or text.get("rope_parameters") or {}
    sections = data.get("mrope_section") or default
    layers = []
    for layer in found.layers:
        rope, pairs = layer.rope or RopeConfig(), layer.attention.head_dim // 2
        if rope.kind in ("dynamic", "longrope"):
            raise UnsupportedModelError(f"rope scaling {rope.kind!r} together with mrope_section is not supported")
        if len(sections) != 3 or not all(type(n) is int and n >= 0 for n in sections) or sum(sections) != pairs:
            raise ConfigError(f"config.json: mrope_section {str(sections)[:100]} must be 3 numbers that make {pairs}")
        rope = dataclasses.replace(rope, sections=tuple(sections), alternating=alternating)
        layers.append(dataclasses.replace(layer, rope=rope))
    return dataclasses.replace(found, layers=tuple(layers))


def tower(hf: HfConfig, v: HfConfig, **fields: Any) -> QwenVision:
    """What the towers share.

    Args:
      hf: the whole config.
      v: its ``vision_config``, with defaults.
      **fields: of `QwenVision`.

    Raises:
      ConfigError: if sizes do not fit.
    """
    size, heads = fields.get("size") or required(v, "hidden_size"), required(v, "num_heads")
    known: dict[str, Any] = {
        "token": nested.image_token(hf, 151655),
        "size": size,
        "layers": required(v, "depth"),
        "heads": heads,
        "patch": required(v, "patch_size"),
        "temporal": required(v, "temporal_patch_size"),
        "channels": required(v, "in_channels"),
        "merge": required(v, "spatial_merge_size"),
        "activation": nested.activation(v["hidden_act"]),
    }
    if size % (4 * heads):
        raise ConfigError(f"config.json: {size} channels of the tower do not make {heads} heads of a multiple of 4")
    return QwenVision(**(known | fields))


def places(layers: int, merger: Mapping[str, str], mlp: Mapping[str, str]) -> list[tuple[str, str, dict[str, str]]]:
    """For `nested.name_fields`: as published, and as nested since transformers 4.52."""
    out = []
    for text, visual in (("model", "visual"), ("model.language_model", "model.visual")):
        entries = {"vision": visual, "vision.patch_embed": f"{visual}.patch_embed.proj"}
        entries |= {f"vision.merger.{k}": f"{visual}.merger.{v}" for k, v in merger.items()}
        out.append((text, "lm_head", entries | nested.per_layer("vision.blocks", f"{visual}.blocks", layers, mlp)))
    return out


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "qwen2_vl"."""
    text = decoder(hf, text_part(hf))
    defaults = {"depth": 32, "embed_dim": 1280, "hidden_act": "quick_gelu", "mlp_ratio": 4}
    v = SIZES | defaults | nested.part(hf, "vision_config")
    size = required(v, "embed_dim")
    vision = tower(hf, v, size=size, mlp=int(size * v["mlp_ratio"]))
    names = nested.name_fields(text.names, places(vision.layers, MERGER, nested.MLP))
    return dataclasses.replace(text, vision=vision, **names)
