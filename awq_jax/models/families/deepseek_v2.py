"""DeepSeek-V2 and its Lite and Coder releases: latent attention, experts in groups, shared experts."""

import math
from typing import Any

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.errors import UnsupportedModelError
from awq_jax.models.config import LatentConfig, ModelConfig
from awq_jax.models.families.qwen2_moe import EXPERTS
from awq_jax.models.hf.config import base, required
from awq_jax.models.hf.moe import after_dense, moe_config, shared_experts
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.names import names

NAMES = names(EXPERTS | {"mlp.shared_expert": "mlp.shared_experts"})


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "deepseek_v2".

    Raises:
      UnsupportedModelError: for another way to choose experts, or weights that are made to add up to 1.
    """
    method = hf.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy") or hf.get("scoring_func", "softmax") != "softmax":
        raise UnsupportedModelError(f"deepseek_v2 with topk_method {method!r} or scoring_func other than 'softmax'")
    if flag(hf, "norm_topk_prob"):
        raise UnsupportedModelError("deepseek_v2 with norm_topk_prob: its releases disagree about what that does")
    grouped = method == "group_limited_greedy"
    moe = moe_config(
        hf,
        scale=float(hf.get("routed_scaling_factor", 1.0)),
        groups=required(hf, "n_group") if grouped else 1,
        top_groups=required(hf, "topk_group") if grouped else 1,
        **shared_experts(hf),
    )
    return latent_base(hf, mlps=after_dense(hf, moe), names=NAMES)


def latent_base(hf: HfConfig, interleaved: bool = True, **changes: Any) -> ModelConfig:
    """A model with latent attention.

    Args:
      hf: content of ``config.json``.
      interleaved: neighbouring channels are rotated together.
      **changes: as `awq_jax.models.hf.config.base` takes them.
    """
    data = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    rotated, plain = required(hf, "qk_rope_head_dim"), required(hf, "qk_nope_head_dim")
    heads = required(hf, "num_attention_heads")
    stretched = data.get("rope_type", data.get("type", "default")) != "default"
    temperature = 1.0
    if stretched and data.get("mscale_all_dim") and data.get("factor", 1) > 1:
        temperature = 0.1 * float(data["mscale_all_dim"]) * math.log(data["factor"]) + 1
    latent = LatentConfig(
        heads=heads,
        q_rank=hf.get("q_lora_rank"),
        kv_rank=required(hf, "kv_lora_rank"),
        nope_dim=plain,
        rope_dim=rotated,
        value_dim=hf.get("v_head_dim") or required(hf, "hidden_size") // heads,
        bias=flag(hf, "attention_bias"),
        scale=(plain + rotated) ** -0.5 * temperature**2,
    )
    return base(hf, mixers=latent, ropes=rope_config(hf, dims=rotated, interleaved=interleaved), **changes)
