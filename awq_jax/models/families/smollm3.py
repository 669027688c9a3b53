"""SmolLM3: Llama where every fourth layer does not rotate queries and keys."""

from awq_jax.convert.config_json import HfConfig, flag
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.config import base, biases, layer_types, required, windows
from awq_jax.models.hf.rope import rope_config


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "smollm3"."""
    count = required(hf, "num_hidden_layers")
    rotates = hf.get("no_rope_layers")  # despite its name: 1 where the layer rotates
    if rotates is None:
        interval = hf.get("no_rope_layer_interval", 4)
        rotates = [int((i + 1) % interval != 0) for i in range(count)]
    rope = rope_config(hf, theta=2000000.0)
    window = hf.get("sliding_window") if flag(hf, "use_sliding_window") else None
    return base(
        hf,
        ropes=[rope if r else None for r in rotates[:count]],
        windows=windows(layer_types(hf, lambda i: not rotates[i]), window),
        attention=biases(hf),
        mlp={"bias": flag(hf, "mlp_bias")},
    )
