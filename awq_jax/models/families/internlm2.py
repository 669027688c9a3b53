"""InternLM2 and 2.5: Llama with q, k, v fused by key/value head, and names of its own."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases
from awq_jax.models.names import names

NAMES = names(
    {
        "embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.qkv_proj": "attention.wqkv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "internlm2"."""
    return base(hf, attention=biases(hf, "bias", True) | {"fused": "grouped"}, names=NAMES)
