"""Reference decoder (Flax NNX) and the model families it runs."""

from awq_jax.models.config import LayerConfig, ModelConfig, RopeConfig
from awq_jax.models.decoder import Cache, Decoder, init_cache
from awq_jax.models.registry import config_from_hf, supported

__all__ = [
    "Cache",
    "Decoder",
    "LayerConfig",
    "ModelConfig",
    "RopeConfig",
    "config_from_hf",
    "init_cache",
    "supported",
]
