"""GLM-4-0414 and GLM-Z1: GLM with a norm before and after each half of a layer."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import glm
from awq_jax.models.names import names

NAMES = names(
    {
        "attention_output_layernorm": "post_self_attn_layernorm",
        "mlp_output_layernorm": "post_mlp_layernorm",
    }
)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "glm4"."""
    return glm.config(hf, norms="sandwich", names=NAMES)
