"""MiniCPM 1, 2 and 4: Llama with multipliers on the embedding, the residual stream and the logits."""

import math

from awq_jax.convert.config_json import HfConfig
from awq_jax.errors import UnsupportedModelError
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases, required


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "minicpm".

    Raises:
      UnsupportedModelError: for the version with experts, and for sparse attention.
    """
    for key in ("num_experts", "sparse_config"):
        if hf.get(key):
            raise UnsupportedModelError(f"minicpm with {key}: only dense models are supported")
    size, count = required(hf, "hidden_size"), required(hf, "num_hidden_layers")
    return base(
        hf,
        attention=biases(hf),
        embed_scale=float(hf.get("scale_emb", 1)),
        residual_scale=float(hf.get("scale_depth", 1)) / math.sqrt(count),
        logit_scale=float(hf.get("dim_model_base", 1)) / size,
    )
