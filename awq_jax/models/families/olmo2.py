"""OLMo 2: norms after each half of a layer, and one over all queries and one over all keys."""

from typing import Any

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases, norm_config
from awq_jax.models.names import names

NAMES = names(
    {
        "attention_output_layernorm": "post_attention_layernorm",
        "mlp_output_layernorm": "post_feedforward_layernorm",
    }
)


def config(hf: HfConfig, **changes: Any) -> ModelConfig:
    """``model_type`` "olmo2"; ``changes`` are arguments of `base` that differ in its relatives."""
    norm = norm_config(hf, 1e-5)
    return base(
        hf,
        attention=biases(hf) | {"norm": norm, "norm_over": "width"},
        norm=norm,
        norms="post",
        names=NAMES,
        **changes,
    )
