"""Baichuan 1 and 2: Llama with fused q, k, v; 13B has ALiBi, and Baichuan 2 normalises its output projection."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, required
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.names import names

NAMES = names({"self_attn.qkv_proj": "self_attn.W_pack"})


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "baichuan": all sizes and versions share it, and no key tells them apart.

    7B (hidden size 4096) rotates, 13B (5120) does not; of other sizes those that rotate call their length
    ``max_position_embeddings``, the others ``model_max_length``. Baichuan 2 has a vocabulary of 125696 and
    ``z_loss_weight``.
    """
    size = required(hf, "hidden_size")
    rotates = size == 4096 or (size != 5120 and "max_position_embeddings" in hf)
    length = hf.get("max_position_embeddings") or hf.get("model_max_length", 4096)
    return base(
        {"max_position_embeddings": length} | dict(hf),
        attention={"fused": "concatenated", "alibi": None if rotates else "float32"},
        ropes=rope_config(hf) if rotates else None,
        head_norm="z_loss_weight" in hf or hf.get("vocab_size") == 125696,
        names=NAMES,
    )
