"""OLMoE: Llama with experts, and norms over all queries and all keys."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig, NormConfig
from awq_jax.models.families.qwen2_moe import NAMES
from awq_jax.models.hf.config import base, get, required
from awq_jax.models.hf.moe import moe_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "olmoe"."""
    bias, eps = bool(hf.get("attention_bias", False)), float(get(hf, "norm_eps", 1e-5))
    clip = hf.get("clip_qkv")
    return base(
        hf,
        attention={
            "qkv_bias": bias,
            "o_bias": bias,
            "norm": NormConfig(eps=eps),
            "norm_over": "width",
            "clip": None if clip is None else float(clip),
        },
        norm={"eps": eps},
        mlps=[moe_config(hf)] * required(hf, "num_hidden_layers"),
        names=NAMES,
    )
