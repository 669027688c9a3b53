"""LLaVA 1.5: a Llama (or Mistral, Qwen) that reads what CLIP or SigLIP sees, through an MLP"""

import dataclasses

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.errors import ConfigError, UnsupportedModelError
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import llama, mistral, qwen2
from awq_jax.models.vision import hf as nested
from awq_jax.models.vision.config import LlavaVision

TEXTS = {"llama": llama.config, "mistral": mistral.config, "qwen2": qwen2.config}
OTHERS = {"vision.projector": "multi_modal_projector", "vision.image_newline": "image_newline"}


def config(hf: HfConfig, tiles: tuple[tuple[int, int], ...] = ()) -> ModelConfig:
    """``model_type`` "llava".

    Raises:
      UnsupportedModelError: for features that are not hidden states of a tower.
    """
    text = nested.text_config(hf, nested.part(hf, "text_config", needed=False), TEXTS, "llama")
    tower = nested.vit_config(hf)
    layer = hf.get("vision_feature_layer", -2)
    features = tuple(layer) if isinstance(layer, list) else (layer,)
    states = tower.layers + 1
    if not features or not all(type(f) is int and -states <= f < states for f in features):
        raise ConfigError(f"config.json: vision_feature_layer {str(layer)[:100]} is not one of {states} hidden states")
    strategy = hf.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise UnsupportedModelError(f"vision_feature_select_strategy {str(strategy)[:100]!r} is not supported")
    vision = LlavaVision(
        token=nested.image_token(hf, 32000),
        tower=tower,
        features=features,
        drop_first=strategy == "default",
        activation=nested.activation(hf.get("projector_hidden_act", "gelu")),
        bias=flag(hf, "multimodal_projector_bias", True),
        tiles=tiles,
    )
    places = nested.vit_places(tower.layers, OTHERS)
    return dataclasses.replace(text, vision=vision, **nested.name_fields(text.names, places, nested.UNUSED))
