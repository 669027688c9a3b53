"""Yi as it was first published, with code of its own: Llama with other names for its norms."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.names import names

NAMES = names({"input_layernorm": "ln1", "post_attention_layernorm": "ln2"})


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "Yi"; today's releases say "llama"."""
    return base(hf, ropes=rope_config(hf, theta=5e6), names=NAMES)
