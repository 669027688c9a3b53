"""dots.llm1: DeepSeek-V3's experts with the attention of Qwen3."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig, NormConfig
from awq_jax.models.families.deepseek_v3 import NAMES, sigmoid_experts
from awq_jax.models.hf.config import base, get, layer_types, required, windows
from awq_jax.models.hf.moe import after_dense
from awq_jax.models.names import names


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "dots1"."""
    hf = {"norm_topk_prob": False} | dict(hf)
    bias = bool(hf.get("attention_bias", False))
    window, first = hf.get("sliding_window", 4096), hf.get("max_window_layers", 62)
    count = required(hf, "num_hidden_layers")
    default = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(count)]
    return base(
        hf,
        attention={"qkv_bias": bias, "o_bias": bias, "norm": NormConfig(eps=float(get(hf, "norm_eps", 1e-6)))},
        mlps=after_dense(hf, sigmoid_experts(hf)),
        windows=windows(layer_types(hf, default), window),
        names=names(NAMES),
    )
