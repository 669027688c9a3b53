"""Apertus: Llama with a norm of each head, and an MLP that has no gate and an activation with parameters."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases, norm_config, plain_mlp
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.names import names

NAMES = names({"input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm"})
ROPE = {"rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, "original_max_position_embeddings": 8192}
ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "apertus"."""
    norm = norm_config(hf, 1e-5)
    said = hf.get("rope_scaling") or hf.get("rope_parameters")
    return base(
        hf,
        attention=biases(hf) | {"norm": norm},
        mlp=plain_mlp(hf, "xielu", bias=False),
        norm=norm,
        ropes=rope_config(hf, theta=12e6, data=None if said else ROPE),
        names=NAMES,
    )
