"""Phi-3 and Phi-3.5 Vision: the text part, Phi-3; what looks at images is carried through as it is"""

import dataclasses

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import phi3


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "phi3_v"."""
    found = phi3.config(hf)
    return dataclasses.replace(found, names=dataclasses.replace(found.names, carried=r"^model\.vision_embed_tokens\."))
