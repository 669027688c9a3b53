"""OPT: LayerNorm, learned positions that begin at row 2, ReLU."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig, NormConfig
from awq_jax.models.hf.config import base, biases, plain_mlp, required
from awq_jax.models.names import names

NAMES = names(
    {
        "layers": "model.decoder.layers",
        "embed_tokens": "model.decoder.embed_tokens",
        "embed_positions": "model.decoder.embed_positions",
        "project_in": "model.decoder.project_in",
        "project_out": "model.decoder.project_out",
        "norm": "model.decoder.final_layer_norm",
        "input_layernorm": "self_attn_layer_norm",
        "post_attention_layernorm": "final_layer_norm",
        "self_attn.o_proj": "self_attn.out_proj",
        "mlp.up_proj": "fc1",
        "mlp.down_proj": "fc2",
    }
)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "opt"."""
    affine = flag(hf, "layer_norm_elementwise_affine", True)
    before = flag(hf, "do_layer_norm_before", True)
    return base(
        hf,
        attention={"kv_heads": required(hf, "num_attention_heads"), **biases(hf, "enable_bias", True)},
        mlp=plain_mlp(hf, "relu", flag(hf, "enable_bias", True), size=required(hf, "ffn_dim")),
        norm=NormConfig("layer", 1e-5, scale=affine, bias=affine),
        norms="pre" if before else "residual",
        final_norm=before and not flag(hf, "_remove_final_layer_norm"),
        ropes=None,
        positions=required(hf, "max_position_embeddings") + 2,
        position_offset=2,
        embed_size=hf.get("word_embed_proj_dim"),
        names=NAMES,
    )
