"""Nemotron 3 and 4, Minitron: LayerNorm that stores its scale less one, half of a head rotated, squared ReLU."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, get
from awq_jax.models.hf.rope import rope_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "nemotron"."""
    bias = bool(hf.get("attention_bias", False))
    return base(
        hf,
        attention={"qkv_bias": bias, "o_bias": bias},
        mlp={"gated": False, "bias": bool(hf.get("mlp_bias", False)), "activation": get(hf, "hidden_act", "relu2")},
        norm={"kind": "layer", "eps": float(get(hf, "norm_eps", 1e-5)), "bias": True, "offset": 1.0},
        ropes=rope_config(hf, fraction=0.5),
    )
