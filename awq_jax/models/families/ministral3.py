"""Ministral 3: Mistral with a YaRN rope and queries that grow with their position."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, norm_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "ministral3"."""
    data = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    beta, length = data.get("llama_4_scaling_beta"), data.get("original_max_position_embeddings")
    return base(
        hf,
        norm=norm_config(hf, 1e-5),
        attention={
            "head_dim": hf.get("head_dim") or 128,
            "query_growth": (float(beta), int(length)) if beta and length else None,
        },
        windows=hf.get("sliding_window"),
    )
