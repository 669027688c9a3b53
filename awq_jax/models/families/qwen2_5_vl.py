"""Qwen2.5-VL: Qwen2-VL whose tower attends within windows in most layers, and is built as its decoder is"""

import dataclasses

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import qwen2_vl
from awq_jax.models.hf.config import required
from awq_jax.models.vision import hf as nested

DEFAULTS = {"depth": 32, "hidden_size": 3584, "hidden_act": "silu", "intermediate_size": 3420}
DEFAULTS |= {"window_size": 112, "fullatt_block_indexes": (7, 15, 23, 31)}


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "qwen2_5_vl"."""
    text = qwen2_vl.decoder(hf, qwen2_vl.text_part(hf))
    v = qwen2_vl.SIZES | DEFAULTS | nested.part(hf, "vision_config")
    window = required(v, "window_size") // required(v, "spatial_merge_size") // required(v, "patch_size")
    vision = qwen2_vl.tower(
        hf,
        v,
        mlp=required(v, "intermediate_size"),
        gated=True,
        rms=True,
        window=window,
        full=tuple(v["fullatt_block_indexes"]),
    )
    names = nested.name_fields(text.names, qwen2_vl.places(vision.layers, qwen2_vl.MERGER, {}))
    return dataclasses.replace(text, vision=vision, **names)
