"""GPT-BigCode (SantaCoder, StarCoder): GPT-2 with one key/value head."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.families.gpt2 import ENTRIES
from awq_jax.models.hf.config import base, norm_config, plain_mlp, required
from awq_jax.models.names import names

NAMES = names(ENTRIES)  # its linears are stored [out, in]


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "gpt_bigcode"."""
    one = flag(hf, "multi_query", True)
    return base(
        hf,
        attention={
            "kv_heads": 1 if one else required(hf, "num_attention_heads"),
            "fused": "concatenated" if one else "grouped",
            "qkv_bias": True,
            "o_bias": True,
            "scale": None if flag(hf, "scale_attn_weights", True) else 1.0,
        },
        mlp=plain_mlp(hf, "gelu_pytorch_tanh", size=hf.get("n_inner") or 4 * required(hf, "hidden_size")),
        norm=norm_config(hf, 1e-5, kind="layer", bias=True),
        ropes=None,
        positions=required(hf, "max_position_embeddings"),
        names=NAMES,
    )
