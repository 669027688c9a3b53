"""GPT-2: LayerNorm, learned positions, fused q, k, v, and linears stored [in, out]."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.errors import UnsupportedModelError
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, norm_config, plain_mlp, required
from awq_jax.models.names import names

LAYERS = {
    "layers": "transformer.h",
    "embed_tokens": "transformer.wte",
    "norm": "transformer.ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}
ENTRIES = LAYERS | {
    "embed_positions": "transformer.wpe",
    "self_attn.qkv_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
NAMES = names(ENTRIES, linear_out_in=False)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "gpt2".

    Raises:
      UnsupportedModelError: for scores scaled by the layer's number.
    """
    if flag(hf, "scale_attn_by_inverse_layer_idx") or not flag(hf, "scale_attn_weights", True):
        raise UnsupportedModelError("gpt2 with scale_attn_by_inverse_layer_idx or without scaled scores")
    return base(
        hf,
        attention={
            "kv_heads": required(hf, "num_attention_heads"),
            "fused": "concatenated",
            "qkv_bias": True,
            "o_bias": True,
        },
        mlp=plain_mlp(hf, "gelu_new", size=hf.get("n_inner") or 4 * required(hf, "hidden_size")),
        norm=norm_config(hf, 1e-5, kind="layer", bias=True),
        ropes=None,
        positions=required(hf, "max_position_embeddings"),
        names=NAMES,
    )
