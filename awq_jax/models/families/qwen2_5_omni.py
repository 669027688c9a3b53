"""Qwen2.5-Omni: the thinker's decoder; what sees, hears and speaks is carried through as it is"""

import dataclasses

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import qwen2_vl
from awq_jax.models.vision import hf as nested

CARRIED = r"^(thinker\.(model\.)?(visual|audio_tower)|talker|token2wav)\."


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "qwen2_5_omni"."""
    thinker = nested.part(hf, "thinker_config")
    found = qwen2_vl.decoder({**thinker, "model_type": hf["model_type"]}, nested.part(thinker, "text_config"))
    places: list[tuple[str, str, dict[str, str]]] = [("thinker.model", "thinker.lm_head", {})]
    return dataclasses.replace(found, **nested.name_fields(found.names, places, CARRIED))
