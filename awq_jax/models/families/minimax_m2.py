"""MiniMax-M2: Mixtral with experts chosen by sigmoids and a correction, and norms over all queries and all keys."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.families.mixtral import NAMES as MIXTRAL
from awq_jax.models.hf.config import base, norm_config
from awq_jax.models.hf.moe import moe_config
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.names import names

NAMES = names(
    dict(MIXTRAL.entries) | {"mlp.correction": "block_sparse_moe.e_score_correction_bias"},
    carried=r"\.mtp\.|^model\.mtp",  # predicts the tokens after the next
)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "minimax_m2"."""
    hf = {"head_dim": 128} | dict(hf)
    fraction = hf["rotary_dim"] / hf["head_dim"] if hf.get("rotary_dim") else 1.0
    return base(
        hf,
        attention={"norm": norm_config(hf), "norm_over": "width"},
        mlps=moe_config(hf, score="sigmoid", correction=True, normalize=True),
        ropes=rope_config(hf, theta=5e6, fraction=fraction),
        names=NAMES,
    )
