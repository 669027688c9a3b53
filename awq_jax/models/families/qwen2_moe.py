"""Qwen1.5 and Qwen2 MoE: Qwen2 with experts and one that all tokens share, with a gate."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import MLPConfig, ModelConfig, MoEConfig
from awq_jax.models.families.qwen2 import qwen_windows
from awq_jax.models.hf.config import base, mlp_config, required
from awq_jax.models.names import names

EXPERTS = {
    "mlp.experts.gate_proj": "mlp.experts.{e}.gate_proj",
    "mlp.experts.up_proj": "mlp.experts.{e}.up_proj",
    "mlp.experts.down_proj": "mlp.experts.{e}.down_proj",
}
NAMES = names(EXPERTS)


def qwen_mlps(hf: HfConfig, moe: MoEConfig) -> list[MLPConfig | MoEConfig]:
    """Experts in every ``decoder_sparse_step``-th layer that is not in ``mlp_only_layers``."""
    dense, step = hf.get("mlp_only_layers") or (), hf.get("decoder_sparse_step") or 1
    return [mlp_config(hf) if i in dense or (i + 1) % step else moe for i in range(required(hf, "num_hidden_layers"))]


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "qwen2_moe"."""
    moe = MoEConfig(
        required(hf, "num_experts"),
        required(hf, "num_experts_per_tok"),
        mlp_config(hf, size=required(hf, "moe_intermediate_size")),
        shared=mlp_config(hf, size=required(hf, "shared_expert_intermediate_size")),
        shared_gate=True,
        normalize=flag(hf, "norm_topk_prob"),
    )
    return base(
        hf,
        mlps=qwen_mlps(hf, moe),
        windows=qwen_windows(hf),
        attention={"qkv_bias": flag(hf, "qkv_bias", True)},
        names=NAMES,
    )
