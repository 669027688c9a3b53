"""StarCoder2: LayerNorm, biases, an MLP without gate, and optionally a sliding window."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases, norm_config, plain_mlp
from awq_jax.models.names import names

NAMES = names({"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"})


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "starcoder2"."""
    return base(
        hf,
        attention=biases(hf, "use_bias", True),
        mlp=plain_mlp(hf, "gelu_pytorch_tanh", flag(hf, "use_bias", True)),
        norm=norm_config(hf, 1e-5, kind="layer", bias=True),
        windows=hf.get("sliding_window"),
        names=NAMES,
    )
