"""Arcee (AFM): Llama with an MLP that has no gate and a squared ReLU."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases, norm_config, plain_mlp


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "arcee"."""
    return base(
        hf,
        attention=biases(hf),
        mlp=plain_mlp(hf, "relu2", bias=flag(hf, "mlp_bias")),
        norm=norm_config(hf, 1e-5),
    )
