"""Command R7B and Command A: Cohere with three layers that have a window and a rope to one with neither."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, get, layer_types, required, windows
from awq_jax.models.hf.rope import rope_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "cohere2"."""
    bias = bool(hf.get("attention_bias", False))
    window = hf.get("sliding_window", 4096)
    pattern = hf.get("sliding_window_pattern") or 4
    count = required(hf, "num_hidden_layers")
    types = layer_types(hf, ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)])
    rope = rope_config(hf, interleaved=True)
    each = windows(types, window)
    return base(
        hf,
        attention={"qkv_bias": bias, "o_bias": bias},
        norm={"kind": "layer", "eps": float(get(hf, "norm_eps", 1e-5))},
        ropes=[None if w is None else rope for w in each],
        windows=each,
        parallel="one",
        logit_scale=float(hf.get("logit_scale", 0.0625)),
    )
