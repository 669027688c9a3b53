"""gpt-oss: experts with biases and a clipped gate, attention sinks, a window on every other layer."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases, layer_types, mlp_config, norm_config, windows
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
    limit, steepness = float(hf.get("swiglu_limit", 7.0)), float(hf.get("swiglu_alpha", 1.702))
    expert = mlp_config(hf, bias=True, limit=limit, steepness=steepness)
    return base(
        hf,
        attention=biases(hf, default=True) | {"sinks": True},
        norm=norm_config(hf, 1e-5),
        mlps=moe_config(hf, expert=expert, normalize=True, router_bias=True),
        ropes=rope_config(hf, theta=150000.0),
        windows=windows(layer_types(hf, lambda i: i % 2 == 0), hf.get("sliding_window", 128)),
        names=NAMES,
    )
