"""Qwen3-Next: three gated delta nets to one gated attention, experts, norms that store their scale less one."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.errors import UnsupportedModelError
from awq_jax.models.config import DeltaConfig, ModelConfig
from awq_jax.models.families.qwen2_moe import EXPERTS, qwen_mlps
from awq_jax.models.hf.config import attention_config, base, biases, mlp_config, norm_config, required
from awq_jax.models.hf.moe import moe_config
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.names import names

PARTS = ("in_proj_qkvz", "in_proj_ba", "norm", "out_proj", "dt_bias", "A_log")
NAMES = names(
    EXPERTS
    | {f"self_attn.{part}": f"linear_attn.{part}" for part in PARTS}
    | {"self_attn.conv": "linear_attn.conv1d.weight"},
    carried=r"^mtp\.",  # predicts several tokens ahead
)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "qwen3_next".

    Raises:
      UnsupportedModelError: for another kind of layer, or another activation in the delta nets.
    """
    count, period = required(hf, "num_hidden_layers"), hf.get("full_attention_interval") or 4
    types = hf.get("layer_types") or [
        "linear_attention" if (i + 1) % period else "full_attention" for i in range(count)
    ]
    unknown = set(types) - {"linear_attention", "full_attention"}
    if unknown or hf.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"qwen3_next with layers {sorted(unknown)} or hidden_act {hf.get('hidden_act')!r}")
    norm = norm_config(hf, offset=1.0)
    attention = attention_config(hf, **biases(hf), norm=norm, gated=True)
    delta = DeltaConfig(
        key_heads=required(hf, "linear_num_key_heads"),
        value_heads=required(hf, "linear_num_value_heads"),
        key_dim=required(hf, "linear_key_head_dim"),
        value_dim=required(hf, "linear_value_head_dim"),
        window=required(hf, "linear_conv_kernel_dim"),
        eps=norm.eps,
    )
    shared = mlp_config(hf, size=required(hf, "shared_expert_intermediate_size"))
    moe = moe_config(hf, normalize=flag(hf, "norm_topk_prob", True), shared=shared, shared_gate=True)
    rope = rope_config(hf, fraction=0.25)
    full = [t == "full_attention" for t in types[:count]]
    return base(
        hf,
        mixers=[attention if f else delta for f in full],
        ropes=[rope if f else None for f in full],
        mlps=qwen_mlps(hf, moe),
        norm=norm,
        names=NAMES,
    )
