"""GPT-J: attention and MLP side by side after one norm, neighbouring channels rotated."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig, RopeConfig
from awq_jax.models.hf.config import base, norm_config, plain_mlp, required
from awq_jax.models.names import names

NAMES = names(
    {
        "layers": "transformer.h",
        "embed_tokens": "transformer.wte",
        "norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "self_attn": "attn",
        "self_attn.o_proj": "attn.out_proj",
        "mlp.up_proj": "mlp.fc_in",
        "mlp.down_proj": "mlp.fc_out",
    }
)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "gptj"."""
    return base(
        hf,
        attention={"kv_heads": required(hf, "num_attention_heads")},
        mlp=plain_mlp(hf, "gelu_new", size=hf.get("n_inner") or 4 * required(hf, "hidden_size")),
        norm=norm_config(hf, 1e-5, kind="layer", bias=True),
        ropes=RopeConfig(dims=hf.get("rotary_dim"), interleaved=True),
        parallel="one",
        head_bias=True,
        names=NAMES,
    )
