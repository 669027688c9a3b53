"""Command R: LayerNorm without bias, attention and MLP side by side, neighbouring channels rotated."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases, norm_config
from awq_jax.models.hf.rope import rope_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "cohere"."""
    norm = norm_config(hf, 1e-5, kind="layer")
    return base(
        hf,
        attention=biases(hf) | {"norm": norm if flag(hf, "use_qk_norm") else None, "norm_over": "heads"},
        norm=norm,
        ropes=rope_config(hf, theta=500000.0, interleaved=True),
        parallel="one",
        logit_scale=float(hf.get("logit_scale", 0.0625)),
    )
