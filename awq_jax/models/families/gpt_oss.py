"""gpt-oss: experts with biases and a clipped gate, attention sinks, a window on every other layer."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, get, layer_types, mlp_config, required, windows
from awq_jax.models.hf.moe import moe_config
from awq_jax.models.hf.rope import rope_config
from awq_jax.models.names import names

HALVES = ("gate_proj", "up_proj")
NAMES = names(
    {
        "mlp.gate": "mlp.router",
        **{f"mlp.experts.{h}.kernel": f"mlp.experts.gate_up_proj[{i}::2]" for i, h in enumerate(HALVES)},
        **{f"mlp.experts.{h}.bias": f"mlp.experts.gate_up_proj_bias[{i}::2]" for i, h in enumerate(HALVES)},
        "mlp.experts.down_proj.kernel": "mlp.experts.down_proj",
        "mlp.experts.down_proj.bias": "mlp.experts.down_proj_bias",
    },
    packed={
        f"mlp.experts.{linear}.{ours}": f"mlp.experts.{{e}}.{linear}.{theirs}"
        for linear in (*HALVES, "down_proj")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
)


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "gpt_oss"; as floats (the published MXFP4 is to be made float first)."""
    count = required(hf, "num_hidden_layers")
    types = layer_types(hf, ["full_attention" if i % 2 else "sliding_attention" for i in range(count)])
    bias, limit = bool(hf.get("attention_bias", True)), float(hf.get("swiglu_limit", 7.0))
    expert = mlp_config(hf, bias=True, limit=limit, steepness=float(hf.get("swiglu_alpha", 1.702)))
    return base(
        hf,
        attention={"qkv_bias": bias, "o_bias": bias, "sinks": True},
        norm={"eps": float(get(hf, "norm_eps", 1e-5))},
        mlps=[moe_config(hf, expert=expert, normalize=True, router_bias=True)] * count,
        ropes=rope_config(hf, theta=150000.0),
        windows=windows(types, hf.get("sliding_window", 128)),
        names=NAMES,
    )
