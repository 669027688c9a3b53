"""dots.llm1: DeepSeek-V3's experts with the attention of Qwen3."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.families.deepseek_v3 import NAMES, sigmoid_experts
from awq_jax.models.hf.config import base, biases, layer_types, norm_config, windows
from awq_jax.models.hf.moe import after_dense
from awq_jax.models.names import names


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "dots1"."""
    hf = {"norm_topk_prob": False} | dict(hf)
    window, first = hf.get("sliding_window", 4096), hf.get("max_window_layers", 62)
    return base(
        hf,
        attention=biases(hf) | {"norm": norm_config(hf)},
        mlps=after_dense(hf, sigmoid_experts(hf)),
        windows=windows(layer_types(hf, lambda i: window is not None and i >= first), window),
        names=names(NAMES),
    )
