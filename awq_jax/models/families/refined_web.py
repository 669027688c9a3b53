"""Falcon as it was first published, with code of its own: other config keys."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import falcon


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "RefinedWeb" (40B) and "RefinedWebModel" (7B, RW); today's releases say "falcon"."""
    large = hf["model_type"] == "RefinedWeb"
    return falcon.config({"num_kv_heads": hf.get("n_head_kv")} | dict(hf) | {"new_decoder_architecture": large})
