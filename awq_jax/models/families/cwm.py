"""Code World Model: Llama with a window on three of four layers."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, get, layer_types, required, windows
from awq_jax.models.hf.rope import rope_config

ROPE = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 8192}
ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "cwm"."""
    count = required(hf, "num_hidden_layers")
    types = layer_types(hf, ["sliding_attention" if i % 4 else "full_attention" for i in range(count)])
    said = hf.get("rope_scaling") or hf.get("rope_parameters")
    return base(
        {"head_dim": 128} | dict(hf),
        norm={"eps": float(get(hf, "norm_eps", 1e-5))},
        ropes=rope_config(hf, theta=1e6, data=None if said else ROPE),
        windows=windows(types, hf.get("sliding_window", 8192)),
    )
