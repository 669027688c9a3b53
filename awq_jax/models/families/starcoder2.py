"""StarCoder2: LayerNorm, biases, an MLP without gate, and optionally a sliding window."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, get, required
from awq_jax.models.names import names

NAMES = names({"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"})


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "starcoder2"."""
    bias = bool(hf.get("use_bias", True))
    return base(
        hf,
        attention={"qkv_bias": bias, "o_bias": bias},
        mlp={"gated": False, "bias": bias, "activation": get(hf, "hidden_act", "gelu_pytorch_tanh")},
        norm={"kind": "layer", "eps": float(get(hf, "norm_eps", 1e-5)), "bias": True},
        windows=[hf.get("sliding_window")] * required(hf, "num_hidden_layers"),
        names=NAMES,
    )
