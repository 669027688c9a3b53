"""GLM-4.7-Flash: DeepSeek-V3 with the experts in all layers but the first."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.families.deepseek_v2 import latent_base
from awq_jax.models.families.deepseek_v3 import NAMES, sigmoid_experts
from awq_jax.models.hf.config import mlp_config, norm_config, predicting_layers
from awq_jax.models.hf.moe import after_dense
from awq_jax.models.names import names


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "glm4_moe_lite"."""
    moe, dense = sigmoid_experts(hf), mlp_config(hf)
    said = hf.get("mlp_layer_types")
    mlps = (
        [moe if t == "sparse" else dense for t in said]
        if said
        else after_dense({"first_k_dense_replace": 1} | dict(hf), moe)
    )
    return latent_base(
        hf,
        flag(hf, "rope_interleave", True),
        mlps=mlps,
        norm=norm_config(hf, 1e-5),
        names=names(NAMES, carried=predicting_layers(hf)),
    )
