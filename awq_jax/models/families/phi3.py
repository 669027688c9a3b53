"""Phi-3 and Phi-4: Llama with fused q, k, v and fused gate and up, and long-context rope."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, norm_config
from awq_jax.models.hf.rope import rope_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "phi3"."""
    data = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    if data.get("rope_type", data.get("type")) == "yarn":  # the first release's name for it
        data |= {"rope_type": "longrope"}
    return base(
        hf,
        attention={"fused": "concatenated"},
        mlp={"fused": True},
        norm=norm_config(hf, 1e-5),
        ropes=rope_config(hf, data=data),
        windows=hf.get("sliding_window"),
    )
