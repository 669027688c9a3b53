"""Hunyuan dense (0.5B to 7B): Llama with a norm of each head after its rotation."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig, RopeConfig
from awq_jax.models.hf.config import base, biases, norm_config
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.names import names

NAMES = names({"self_attn.q_norm": "self_attn.query_layernorm", "self_attn.k_norm": "self_attn.key_layernorm"})


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "hunyuan_v1_dense"."""
    norm = norm_config(hf, 1e-5)
    return base(
        hf,
        attention=biases(hf) | {"norm": norm, "norm_rotated": True},
        norm=norm,
        ropes=_rope(hf),
        names=NAMES,
    )


def _rope(hf: HfConfig) -> RopeConfig:
    """A scaling that is called dynamic but has an ``alpha`` stretches the base alike for all lengths."""
    data = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    if data.get("rope_type", data.get("type")) != "dynamic" or not data.get("alpha"):
        return rope_config(hf)
    dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    theta = float(data.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    return rope_config(hf, data={"rope_theta": theta * float(data["alpha"]) ** (dim / (dim - 2))})
