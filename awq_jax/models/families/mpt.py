"""MPT: ALiBi, LayerNorm without bias, fused q, k, v, optionally clipped."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.errors import UnsupportedModelError
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, norm_config, required
from awq_jax.models.names import names

NAMES = names(
    {
        "layers": "transformer.blocks",
        "embed_tokens": "transformer.wte",
        "norm": "transformer.norm_f",
        "input_layernorm": "norm_1",
        "post_attention_layernorm": "norm_2",
        "self_attn.qkv_proj": "attn.Wqkv",
        "self_attn.o_proj": "attn.out_proj",
        "mlp": "ffn",
    }
)
# Values of keys that no published checkpoint departs from.
ONLY = {"no_bias": True, "logit_scale": None}
ONLY_ATTENTION = {"attn_type": "multihead_attention", "alibi": True, "qk_ln": False, "prefix_lm": False}


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "mpt".

    Raises:
      UnsupportedModelError: for learned positions, biases, multi-query attention and other options that
        the released models do not use.
    """
    attention = dict(hf.get("attn_config") or {})
    for keys, only in ((hf, ONLY), (attention, ONLY_ATTENTION)):
        for key, value in only.items():
            if keys.get(key, value) != value:
                raise UnsupportedModelError(f"mpt with {key}={keys[key]!r}; only {value!r} is supported")
    return base(
        hf,
        attention={
            "kv_heads": required(hf, "num_attention_heads"),
            "fused": "concatenated",
            "scale": attention.get("softmax_scale"),
            "clip": attention.get("clip_qkv") or None,
            "alibi": "float32",
            "alibi_max": float(attention.get("alibi_bias_max", 8)),
        },
        mlp={"size": hf.get("expansion_ratio", 4) * required(hf, "hidden_size"), "activation": "gelu", "gated": False},
        norm=norm_config(hf, 1e-5, kind="layer"),
        ropes=None,
        names=NAMES,
    )
