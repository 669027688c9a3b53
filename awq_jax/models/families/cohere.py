"""Command R: LayerNorm without bias, attention and MLP side by side, neighbouring channels rotated."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig, NormConfig
from awq_jax.models.hf.config import base, get
from awq_jax.models.hf.rope import rope_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "cohere"."""
    bias = bool(hf.get("attention_bias", False))
    norm = NormConfig("layer", eps=float(get(hf, "norm_eps", 1e-5)))
    return base(
        hf,
        attention={
            "qkv_bias": bias,
            "o_bias": bias,
            "norm": norm if hf.get("use_qk_norm", False) else None,
            "norm_over": "heads",
        },
        norm={"kind": "layer", "eps": norm.eps},
        ropes=rope_config(hf, theta=500000.0, interleaved=True),
        parallel="one",
        logit_scale=float(hf.get("logit_scale", 0.0625)),
    )
