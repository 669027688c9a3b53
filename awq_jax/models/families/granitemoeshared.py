"""Granite MoE with an expert that all tokens share, gate and up fused."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import granite, granitemoe
from awq_jax.models.hf.config import mlp_config, required
from awq_jax.models.hf.moe import moe_config
from awq_jax.models.names import names

NAMES = names(
    dict(granitemoe.NAMES.entries)
    | {
        "mlp.shared_expert.gate_up_proj": "shared_mlp.input_linear",
        "mlp.shared_expert.down_proj": "shared_mlp.output_linear",
    },
    packed=dict(granitemoe.NAMES.packed),
)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "granitemoeshared"."""
    size = hf.get("shared_intermediate_size")
    shared = mlp_config(hf, size=required(hf, "shared_intermediate_size"), fused=True) if size else None
    return granite.config(hf, mlps=moe_config(hf, normalize=True, shared=shared), names=NAMES)
