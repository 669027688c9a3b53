"""ERNIE 4.5 MoE: ERNIE 4.5 with experts that a correction helps to choose, and some that all tokens share."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.families.ernie4_5 import ernie_base
from awq_jax.models.families.qwen2_moe import EXPERTS
from awq_jax.models.hf.config import mlp_config, required
from awq_jax.models.hf.moe import moe_config, shared_experts
from awq_jax.models.names import names

NAMES = names(
    EXPERTS
    | {
        "mlp.shared_expert": "mlp.shared_experts",
        "mlp.correction": "mlp.moe_statics.e_score_correction_bias",
    },
    carried=r"^model\.mtp_",  # predicts the token after the next
)
KEYS = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k", "n_shared_experts": "moe_num_shared_experts"}


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "ernie4_5_moe"."""
    hf = {ours: hf[theirs] for ours, theirs in KEYS.items() if theirs in hf} | dict(hf)
    bias = flag(hf, "use_bias")
    count, every = required(hf, "num_hidden_layers"), hf.get("moe_layer_interval") or 1
    first, last = hf.get("moe_layer_start_index", 1), hf.get("moe_layer_end_index", -1)
    moe = moe_config(
        hf,
        expert=mlp_config(hf, size=required(hf, "moe_intermediate_size"), bias=bias),
        normalize=True,
        correction="row",
        **shared_experts(dict(hf) | {"mlp_bias": bias}),
    )
    dense = mlp_config(hf, bias=bias)
    chosen = [(i + 1) % every == 0 and first <= i <= (last if last >= 0 else count - 1) for i in range(count)]
    return ernie_base(hf, mlps=[moe if c else dense for c in chosen], names=NAMES)
