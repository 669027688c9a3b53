"""EXAONE 3 and 3.5: Llama with names of its own."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.families.gpt2 import LAYERS
from awq_jax.models.hf.config import base, norm_config
from awq_jax.models.names import names

NAMES = names(
    LAYERS
    | {
        "self_attn": "attn.attention",
        "self_attn.o_proj": "attn.attention.out_proj",
        "mlp.gate_proj": "mlp.c_fc_0",
        "mlp.up_proj": "mlp.c_fc_1",
        "mlp.down_proj": "mlp.c_proj",
    }
)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "exaone"."""
    return base(hf, norm=norm_config(hf, 1e-5), names=NAMES)
