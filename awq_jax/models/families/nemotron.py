"""Nemotron 3 and 4, Minitron: LayerNorm that stores its scale less one, half of a head rotated, squared ReLU."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases, norm_config, plain_mlp
from awq_jax.models.hf.rope import rope_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "nemotron"."""
    return base(
        hf,
        attention=biases(hf),
        mlp=plain_mlp(hf, "relu2", bias=flag(hf, "mlp_bias")),
        norm=norm_config(hf, 1e-5, kind="layer", bias=True, offset=1.0),
        ropes=rope_config(hf, fraction=0.5),
    )
