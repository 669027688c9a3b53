"""Phi 1 and 2: LayerNorm, half of a head rotated, attention and MLP side by side after one norm."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, norm_config, plain_mlp
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.names import names

NAMES = names(
    {
        "norm": "model.final_layernorm",
        "self_attn.o_proj": "self_attn.dense",
        "self_attn.q_norm": "self_attn.q_layernorm",
        "self_attn.k_norm": "self_attn.k_layernorm",
        "mlp.up_proj": "mlp.fc1",
        "mlp.down_proj": "mlp.fc2",
    }
)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "phi"."""
    head_norm = norm_config(hf, 1e-5, kind="layer", bias=True)
    return base(
        hf,
        attention={"qkv_bias": True, "o_bias": True, "norm": head_norm if flag(hf, "qk_layernorm") else None},
        mlp=plain_mlp(hf, "gelu_new"),
        norm=norm_config(hf, 1e-5, kind="layer", bias=True),
        ropes=rope_config(hf, fraction=0.5),
        parallel="one",
        head_bias=True,
        names=NAMES,
    )
