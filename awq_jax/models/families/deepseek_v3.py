"""DeepSeek-V3, V3.1 and R1: DeepSeek-V2 whose experts are chosen by sigmoids and a correction."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.errors import UnsupportedModelError
from awq_jax.models.config import ModelConfig, MoEConfig
from awq_jax.models.families.deepseek_v2 import latent_base
from awq_jax.models.families.qwen2_moe import EXPERTS
from awq_jax.models.hf.config import predicting_layers
from awq_jax.models.hf.moe import after_dense, moe_config, shared_experts
from awq_jax.models.names import names

NAMES = EXPERTS | {"mlp.shared_expert": "mlp.shared_experts", "mlp.correction": "mlp.gate.e_score_correction_bias"}


def sigmoid_experts(hf: HfConfig) -> MoEConfig:
    """Experts as DeepSeek-V3 chooses them.

    Raises:
      UnsupportedModelError: if they are chosen by something else.
    """
    scoring, method = hf.get("scoring_func", "sigmoid"), hf.get("topk_method", "noaux_tc")
    if scoring != "sigmoid" or method != "noaux_tc":
        raise UnsupportedModelError(f"{hf['model_type']} with scoring_func {scoring!r} and topk_method {method!r}")
    groups = hf.get("n_group") or 1
    return moe_config(
        hf,
        score="sigmoid",
        correction=True,
        groups=groups,
        top_groups=hf.get("topk_group") or 1,
        group_best=2 if groups > 1 else 1,
        normalize=flag(hf, "norm_topk_prob", True),
        scale=float(hf.get("routed_scaling_factor", 1.0)),
        **shared_experts(hf),
    )


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "deepseek_v3"."""
    interleaved = flag(hf, "rope_interleave", True)
    mlps = after_dense(hf, sigmoid_experts(hf))
    return latent_base(hf, interleaved, mlps=mlps, names=names(NAMES, carried=predicting_layers(hf)))
