"""Qwen 1: Llama with fused q, k, v that have biases, and names of its own."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.errors import UnsupportedModelError
from awq_jax.models.config import ModelConfig
from awq_jax.models.families.gpt2 import LAYERS
from awq_jax.models.hf.config import base, get, required
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.names import names

NAMES = names(
    LAYERS
    | {
        "self_attn.qkv_proj": "attn.c_attn",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.gate_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w1",
        "mlp.down_proj": "mlp.c_proj",
    }
)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "qwen".

    Beyond the length it was trained with, ``seq_length``, the model changes its rope and its scores with the
    length of the prompt (``use_dynamic_ntk``, ``use_logn_attn``, both on if the config does not say). That is
    not supported: with either of them ``max_length`` is ``seq_length``, where they begin to matter.

    Raises:
      UnsupportedModelError: for a residual stream that starts after the norm, and for Qwen-VL and Qwen-Audio.
    """
    for key in ("apply_residual_connection_post_layernorm", "visual", "audio"):
        if hf.get(key):
            raise UnsupportedModelError(f"qwen with {key}: only the language models are supported")
    longest = get(hf, "max_position_embeddings", 8192)
    if flag(hf, "use_dynamic_ntk", True) or flag(hf, "use_logn_attn", True):
        longest = hf.get("seq_length", 2048)
    bias = not flag(hf, "no_bias", True)
    head_dim = hf.get("kv_channels", 128)
    return base(
        dict(hf) | {"max_position_embeddings": longest},
        attention={
            "kv_heads": required(hf, "num_attention_heads"),
            "head_dim": head_dim,
            "fused": "concatenated",
            "qkv_bias": True,
            "o_bias": bias,
            "scale": None if flag(hf, "scale_attn_weights", True) else 1.0,
        },
        mlp={"size": required(hf, "intermediate_size") // 2, "bias": bias, "activation": "silu"},
        ropes=rope_config(
            {"head_dim": head_dim} | dict(hf),
            theta=hf.get("rotary_emb_base", 10000),
            fraction=hf.get("rotary_pct", 1.0),
        ),
        names=NAMES,
    )
