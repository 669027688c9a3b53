"""Falcon: 7B (one key/value head, one norm), 40B (grouped heads, two norms), and RW (ALiBi)."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases, norm_config, plain_mlp, required
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.names import names

ENTRIES = {
    "layers": "transformer.h",
    "embed_tokens": "transformer.word_embeddings",
    "norm": "transformer.ln_f",
    "self_attn.qkv_proj": "self_attention.query_key_value",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
NAMES = names(ENTRIES)
TWO_NORMS = names(ENTRIES | {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"})


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "falcon"."""
    hf = {"max_position_embeddings": 2048} | dict(hf)
    heads, new = required(hf, "num_attention_heads"), flag(hf, "new_decoder_architecture")
    several = new or not flag(hf, "multi_query", True)
    two = new and hf.get("num_ln_in_parallel_attn") in (None, 2)
    size = hf.get("ffn_hidden_size") or 4 * required(hf, "hidden_size")
    parallel = ("two" if two else "one") if flag(hf, "parallel_attn", True) or new else None
    alibi = flag(hf, "alibi")
    return base(
        hf,
        attention=biases(hf, "bias")
        | {
            "kv_heads": (hf.get("num_kv_heads") or heads) if several else 1,
            "fused": "grouped",
            "alibi": "bfloat16" if alibi else None,
            "alibi_scaled": alibi,
        },
        mlp=plain_mlp(hf, "gelu", flag(hf, "bias"), size=size),
        norm=norm_config(hf, 1e-5, kind="layer", bias=True),
        ropes=None if alibi else rope_config(hf),
        parallel=parallel,
        names=TWO_NORMS if two else NAMES,
    )
