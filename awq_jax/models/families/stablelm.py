"""StableLM: LayerNorm, a quarter of a head rotated; StableLM 2 12B: a norm of each head, attention beside the MLP."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, norm_config
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.names import names

NAMES = names(
    {
        "self_attn.q_norm.scale": "self_attn.q_layernorm.norms.{e}.weight",
        "self_attn.k_norm.scale": "self_attn.k_layernorm.norms.{e}.weight",
    }
)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "stablelm"."""
    return base(
        hf,
        attention={
            "qkv_bias": flag(hf, "use_qkv_bias"),
            "norm": norm_config(hf, 1e-5, kind="layer") if flag(hf, "qk_layernorm") else None,
            "norm_over": "heads",
        },
        norm=norm_config(hf, 1e-5, kind="layer", bias=True),
        ropes=rope_config(hf, fraction=0.25),
        parallel="one" if flag(hf, "use_parallel_residual") else None,
        names=NAMES,
    )
