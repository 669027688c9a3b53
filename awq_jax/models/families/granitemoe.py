"""Granite MoE: Granite with experts."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import granite
from awq_jax.models.hf.moe import moe_config
from awq_jax.models.names import names

NAMES = names(
    {
        "mlp": "block_sparse_moe",
        "mlp.gate": "block_sparse_moe.router.layer",
        "mlp.experts.gate_proj.kernel": "block_sparse_moe.input_linear.weight[0/2]",
        "mlp.experts.up_proj.kernel": "block_sparse_moe.input_linear.weight[1/2]",
        "mlp.experts.down_proj": "block_sparse_moe.output_linear",
    },
    packed={
        "mlp.experts.gate_proj.kernel": "block_sparse_moe.experts.{e}.gate_proj.weight",
        "mlp.experts.up_proj.kernel": "block_sparse_moe.experts.{e}.up_proj.weight",
        "mlp.experts.down_proj.kernel": "block_sparse_moe.experts.{e}.down_proj.weight",
    },
)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "granitemoe"."""
    return granite.config(hf, mlps=moe_config(hf, normalize=True), names=NAMES)
