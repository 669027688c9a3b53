"""Gemma 3 (4B and larger): Gemma 3 that reads what SigLIP sees; tokens of an image see each other both ways"""

import dataclasses
import math

from awq_jax.convert.config_json import HfConfig
from awq_jax.errors import ConfigError
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import gemma3_text
from awq_jax.models.hf.config import required
from awq_jax.models.vision import hf as nested
from awq_jax.models.vision.config import Gemma3Vision

OTHERS = {
    "vision.projector.norm": "multi_modal_projector.mm_soft_emb_norm",
    "vision.projector.weight": "multi_modal_projector.mm_input_projection_weight",
}


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "gemma3".

    Raises:
      ConfigError: if the features of an image make no square.
    """
    text = nested.text_config(hf, nested.part(hf, "text_config"), {"gemma3_text": gemma3_text.config}, "gemma3_text")
    vision = nested.part(hf, "vision_config")
    tower = nested.vit_config({**hf, "vision_config": {"model_type": "siglip_vision_model"} | vision})
    count = required({"mm_tokens_per_image": 256} | dict(hf), "mm_tokens_per_image")
    side = math.isqrt(count)
    if side**2 != count or side > tower.side:
        raise ConfigError(
            f"config.json: {count} features of an image (mm_tokens_per_image) make no square within its "
            f"{tower.side} x {tower.side} patches"
        )
    places = nested.vit_places(tower.layers, OTHERS)
    names = nested.name_fields(text.names, places, nested.UNUSED)
    return dataclasses.replace(text, vision=Gemma3Vision(nested.image_token(hf, 262144), tower, side), **names)
