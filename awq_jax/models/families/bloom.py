"""BLOOM: ALiBi, a normalised embedding, q, k, v fused by head."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.errors import UnsupportedModelError
from awq_jax.models.config import ModelConfig
from awq_jax.models.families.falcon import ENTRIES
from awq_jax.models.hf.config import base, norm_config, required
from awq_jax.models.names import names

NAMES = names(ENTRIES | {"embed_norm": "transformer.word_embeddings_layernorm"})
LENGTH = 2048  # of training; the config does not always say, and the model has no limit of its own


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "bloom".

    Raises:
      UnsupportedModelError: for a residual stream that starts after the norm.
    """
    if flag(hf, "apply_residual_connection_post_layernorm"):
        raise UnsupportedModelError("bloom with apply_residual_connection_post_layernorm")
    return base(
        {"max_position_embeddings": LENGTH} | dict(hf),
        attention={
            "kv_heads": required(hf, "num_attention_heads"),
            "fused": "grouped",
            "qkv_bias": True,
            "o_bias": True,
            "alibi": "float32",
        },
        mlp={"size": 4 * required(hf, "hidden_size"), "gated": False, "bias": True, "activation": "gelu_new"},
        norm=norm_config(hf, 1e-5, kind="layer", bias=True),
        ropes=None,
        embed_norm=True,
        names=NAMES,
    )
