"""Gemma 2: a norm before and after each half of a layer, soft caps, a window on every other layer."""

from typing import Any

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import gemma
from awq_jax.models.hf.config import layer_types, windows
from awq_jax.models.names import names

NAMES = names(
    {
        "attention_output_layernorm": "post_attention_layernorm",
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "mlp_output_layernorm": "post_feedforward_layernorm",
    }
)


def config(hf: HfConfig, **changes: Any) -> ModelConfig:
    """``model_type`` "gemma2"; ``changes`` are arguments of `base` that differ in its relatives."""
    return gemma.config(
        hf,
        attention={
            "scale": float(hf.get("query_pre_attn_scalar", 256)) ** -0.5,
            "cap": hf.get("attn_logit_softcapping", 50.0),
        },
        windows=windows(layer_types(hf, lambda i: i % 2 == 0), hf.get("sliding_window", 4096)),
        logit_cap=hf.get("final_logit_softcapping", 30.0),
        **{"norms": "sandwich", "names": NAMES} | changes,
    )
