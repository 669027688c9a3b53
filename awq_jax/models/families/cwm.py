"""Code World Model: Llama with a window on three of four layers."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, layer_types, norm_config, windows
from awq_jax.models.hf.rope import rope_config

ROPE = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 8192}
ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "cwm"."""
    said = hf.get("rope_scaling") or hf.get("rope_parameters")
    return base(
        {"head_dim": 128} | dict(hf),
        norm=norm_config(hf, 1e-5),
        ropes=rope_config(hf, theta=1e6, data=None if said else ROPE),
        windows=windows(layer_types(hf, lambda i: i % 4), hf.get("sliding_window", 8192)),
    )
