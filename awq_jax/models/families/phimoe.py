"""Phi-3.5 MoE: Mixtral with LayerNorm, biases, SparseMixer routing and long-context rope."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.errors import ConfigError, UnsupportedModelError
from awq_jax.models.config import ModelConfig, RopeConfig
from awq_jax.models.families.mixtral import NAMES
from awq_jax.models.hf.config import base, biases, norm_config
from awq_jax.models.hf.moe import moe_config
from awq_jax.models.hf.rope import rope_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "phimoe".

    Raises:
      UnsupportedModelError: for another number of experts per token than SparseMixer is defined for.
      ConfigError: if a constant of the rope is missing.
    """
    moe = moe_config(hf, score="sparsemixer", jitter=float(hf.get("router_jitter_noise", 0.01)))
    if moe.top_k != 2:
        raise UnsupportedModelError(f"phimoe chooses 2 experts per token; config.json says {moe.top_k}")
    return base(
        hf,
        attention=biases(hf),
        mlps=moe,
        norm=norm_config(hf, 1e-5, kind="layer", bias=True),
        ropes=_rope(hf),
        windows=hf.get("sliding_window"),
        head_bias=flag(hf, "lm_head_bias"),
        names=NAMES,
    )


def _rope(hf: HfConfig) -> RopeConfig:
    """Long-context rope whose attention factors are given instead of computed."""
    data = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    if data.get("rope_type", data.get("type", "default")) == "default":
        return rope_config(hf, theta=1e6)
    missing = {"short_mscale", "long_mscale"} - set(data)
    if missing:
        raise ConfigError(f"config.json: the rope scaling of phimoe needs {sorted(missing)}")
    return rope_config(
        hf,
        theta=1e6,
        attention_factor=float(data["short_mscale"]),
        long_attention_factor=float(data["long_mscale"]),
    )
