"""Qwen3 MoE: Qwen3 with experts, also in its Coder and Instruct releases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awq_jax.models.config import ModelConfig, MoEConfig, NormConfig
from awq_jax.models.families.qwen2_moe import NAMES, qwen_mlps
from awq_jax.models.hf_config import base, get, mlp_config, required


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """``model_type`` "qwen3_moe"."""
    count = required(hf, "num_hidden_layers")
    moe = MoEConfig(
        required(hf, "num_experts"),
        required(hf, "num_experts_per_tok"),
        mlp_config(hf, size=required(hf, "moe_intermediate_size")),
        normalize=bool(hf.get("norm_topk_prob", False)),
    )
    bias = bool(hf.get("attention_bias", False))
    norm = NormConfig(eps=float(get(hf, "norm_eps", 1e-6)))
    window = hf.get("sliding_window") if hf.get("use_sliding_window", False) else None
    return base(
        hf,
        attention={"qkv_bias": bias, "o_bias": bias, "norm": norm},
        mlps=qwen_mlps(hf, moe),
        windows=[window] * count,
        names=NAMES,
    )
