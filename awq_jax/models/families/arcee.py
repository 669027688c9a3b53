"""Arcee (AFM): Llama with an MLP that has no gate and a squared ReLU."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, get


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "arcee"."""
    bias = bool(hf.get("attention_bias", False))
    return base(
        hf,
        attention={"qkv_bias": bias, "o_bias": bias},
        mlp={"gated": False, "bias": bool(hf.get("mlp_bias", False)), "activation": get(hf, "hidden_act", "relu2")},
        norm={"eps": float(get(hf, "norm_eps", 1e-5))},
    )
