"""OLMo 3: OLMo 2 with a window on three of four layers, and a stretched rope on the fourth."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import olmo2
from awq_jax.models.hf.config import layer_types, windows
from awq_jax.models.hf.rope import rope_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "olmo3"."""
    types = layer_types(hf, lambda i: (i + 1) % 4)
    given = dict(hf.get("rope_parameters") or {})
    data = {
        "sliding_attention": given.get("sliding_attention", {}),
        "full_attention": given.get("full_attention", given if "rope_type" in given else hf.get("rope_scaling") or {}),
    }
    ropes = {kind: rope_config(hf, theta=500000.0, data=values) for kind, values in data.items()}
    return olmo2.config(hf, ropes=[ropes[t] for t in types], windows=windows(types, hf.get("sliding_window", 4096)))
