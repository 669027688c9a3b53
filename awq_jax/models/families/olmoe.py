"""OLMoE: Llama with experts, and norms over all queries and all keys."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.families.qwen2_moe import NAMES
from awq_jax.models.hf.config import base, biases, norm_config
from awq_jax.models.hf.moe import moe_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "olmoe"."""
    norm, clip = norm_config(hf, 1e-5), hf.get("clip_qkv")
    return base(
        hf,
        attention=biases(hf) | {"norm": norm, "norm_over": "width", "clip": None if clip is None else float(clip)},
        norm=norm,
        mlps=moe_config(hf),
        names=NAMES,
    )
