"""Reference decoder (Flax NNX) and the model families it runs."""

from awq_jax.models.config import (
    AttentionConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
)
from awq_jax.models.decoder import Decoder
from awq_jax.models.hf.registry import config_from_hf, supported
from awq_jax.models.layers.cache import Cache, init_cache
from awq_jax.models.weights.naming import config_of

__all__ = [
    "AttentionConfig",
    "Cache",
    "Decoder",
    "LayerConfig",
    "MLPConfig",
    "MoEConfig",
    "ModelConfig",
    "NormConfig",
    "RopeConfig",
    "config_from_hf",
    "config_of",
    "init_cache",
    "supported",
]
