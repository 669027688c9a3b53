"""Qwen3-VL: Qwen3 whose first layers are given more of what the tower saw; tokens turn by frame, row and column"""

import dataclasses
import math
from typing import Any

from awq_jax.convert.config_json import HfConfig
from awq_jax.errors import ConfigError
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import qwen2_vl, qwen3
from awq_jax.models.hf.config import required
from awq_jax.models.vision import hf as nested

DEFAULTS: dict[str, Any] = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 16}
DEFAULTS |= {"hidden_act": "gelu_pytorch_tanh", "num_position_embeddings": 2304}
DEFAULTS |= {"deepstack_visual_indexes": (8, 16, 24)}
MERGER = {"fc1": "linear_fc1", "fc2": "linear_fc2"}
MLP = {"mlp.up_proj": "mlp.linear_fc1", "mlp.down_proj": "mlp.linear_fc2"}


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "qwen3_vl".

    Raises:
      ConfigError: if the learned positions make no square, or a deepstack layer does not exist.
    """
    text = {"rope_theta": 500000.0} | nested.part(hf, "text_config")
    found = nested.text_config(hf, text | {"model_type": "qwen3"}, {"qwen3": qwen3.config}, "qwen3")
    found = qwen2_vl.with_sections(found, text, [24, 20, 20], alternating=True)
    v = qwen2_vl.SIZES | DEFAULTS | nested.part(hf, "vision_config")
    side = math.isqrt(required(v, "num_position_embeddings"))
    deepstack = tuple(v["deepstack_visual_indexes"])
    if side**2 != v["num_position_embeddings"] or not set(deepstack) <= set(range(required(v, "depth"))):
        raise ConfigError(
            "config.json: num_position_embeddings must be a square number and deepstack_visual_indexes be layers of "
            f"the tower; got {str(v['num_position_embeddings'])[:20]} and {str(deepstack)[:100]}"
        )
    vision = qwen2_vl.tower(
        hf, v, mlp=required(v, "intermediate_size"), patch_bias=True, positions=side, deepstack=deepstack
    )
    places = qwen2_vl.places(vision.layers, MERGER, MLP)
    for _, _, entries in places:
        theirs = f"{entries['vision']}.deepstack_merger_list"
        entries |= {"vision.deepstack": theirs} | nested.per_layer("vision.deepstack", theirs, len(deepstack), MERGER)
    return dataclasses.replace(found, vision=vision, **nested.name_fields(found.names, places[::-1]))
