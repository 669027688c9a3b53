"""MiniCPM3: latent attention; the embedding, each half of a layer and the logits are scaled."""

import math

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.families.deepseek_v2 import latent_base
from awq_jax.models.hf.config import norm_config, required


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "minicpm3"."""
    count, size = required(hf, "num_hidden_layers"), required(hf, "hidden_size")
    depth = hf.get("scale_depth", 1.4)
    return latent_base(
        hf,
        norm=norm_config(hf, 1e-5),
        interleaved=False,
        embed_scale=float(hf.get("scale_emb", 12)),
        residual_scale=1.0 if depth is None else depth / math.sqrt(count),
        logit_scale=(hf.get("dim_model_base", 256) or size) / size,
        mlp={"bias": flag(hf, "mlp_bias")},
    )
