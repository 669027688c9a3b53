"""Command R7B and Command A: Cohere with three layers that have a window and a rope to one with neither."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases, layer_types, norm_config, windows
from awq_jax.models.hf.rope import rope_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "cohere2"."""
    pattern = hf.get("sliding_window_pattern") or 4
    each = windows(layer_types(hf, lambda i: (i + 1) % pattern), hf.get("sliding_window", 4096))
    rope = rope_config(hf, interleaved=True)
    return base(
        hf,
        attention=biases(hf),
        norm=norm_config(hf, 1e-5, kind="layer"),
        ropes=[None if w is None else rope for w in each],
        windows=each,
        parallel="one",
        logit_scale=float(hf.get("logit_scale", 0.0625)),
    )
