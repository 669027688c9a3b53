"""Mixtral: Mistral with experts."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig, MoEConfig
from awq_jax.models.hf.config import base, mlp_config, norm_config, required
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.names import names

NAMES = names(
    {
        "mlp": "block_sparse_moe",
        "mlp.experts.gate_proj": "block_sparse_moe.experts.{e}.w1",
        "mlp.experts.up_proj": "block_sparse_moe.experts.{e}.w3",
        "mlp.experts.down_proj": "block_sparse_moe.experts.{e}.w2",
    }
)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "mixtral"."""
    moe = MoEConfig(required(hf, "num_local_experts"), required(hf, "num_experts_per_tok"), mlp_config(hf))
    return base(
        hf,
        mlps=moe,
        norm=norm_config(hf, 1e-5),
        ropes=rope_config(hf, theta=1e6),
        windows=hf.get("sliding_window"),
        names=NAMES,
    )
