"""GLM-4.5 and 4.6: DeepSeek-V3's experts with grouped-query attention, half of a head rotated."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.families.deepseek_v3 import NAMES, sigmoid_experts
from awq_jax.models.hf.config import base, norm_config, predicting_layers
from awq_jax.models.hf.moe import after_dense
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.names import names


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "glm4_moe"."""
    norm = norm_config(hf, 1e-5)
    return base(
        hf,
        attention={
            "qkv_bias": flag(hf, "attention_bias"),
            "norm": norm if flag(hf, "use_qk_norm") else None,
        },
        norm=norm,
        mlps=after_dense({"first_k_dense_replace": 1} | dict(hf), sigmoid_experts(hf)),
        ropes=rope_config(hf, fraction=0.5),
        names=names(NAMES, carried=predicting_layers(hf)),
    )
