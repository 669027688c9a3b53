"""GPT-NeoX and Pythia: attention and MLP side by side after two norms, q, k, v fused by head."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases, norm_config, plain_mlp, required
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.names import names

NAMES = names(
    {
        "layers": "gpt_neox.layers",
        "embed_tokens": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
        "self_attn.qkv_proj": "attention.query_key_value",
        "self_attn.o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    aliases={"embed_out.": "lm_head."},
)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "gpt_neox"."""
    rope = rope_config(hf, theta=hf.get("rotary_emb_base") or 10000.0, fraction=hf.get("rotary_pct") or 0.25)
    return base(
        hf,
        attention=biases(hf, default=True) | {"kv_heads": required(hf, "num_attention_heads"), "fused": "grouped"},
        mlp=plain_mlp(hf, "gelu"),
        norm=norm_config(hf, 1e-5, kind="layer", bias=True),
        ropes=rope,
        parallel="two" if flag(hf, "use_parallel_residual", True) else None,
        names=NAMES,
    )
