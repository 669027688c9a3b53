"""ERNIE 4.5: Llama with neighbouring channels rotated."""

from typing import Any

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases, norm_config
from awq_jax.models.hf.rope import rope_config


def ernie_base(hf: HfConfig, **changes: Any) -> ModelConfig:
    """What both kinds share; ``changes`` as `awq_jax.models.hf.config.base` takes them."""
    return base(
        hf,
        attention=biases(hf, "use_bias"),
        norm=norm_config(hf, 1e-5),
        ropes=rope_config(hf, theta=500000.0, interleaved=True),
        **changes,
    )


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "ernie4_5"."""
    return ernie_base({"head_dim": 128} | dict(hf), mlp={"bias": flag(hf, "use_bias")})
