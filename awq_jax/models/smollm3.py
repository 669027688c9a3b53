"""SmolLM3: Llama where every fourth layer does not rotate queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awq_jax.models.config import LayerConfig, ModelConfig
from awq_jax.models.hf_config import base, required, windows


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """``model_type`` "smollm3"."""
    count = required(hf, "num_hidden_layers")
    ropes = hf.get("no_rope_layers")  # despite its name: 1 where the layer rotates
    if ropes is None:
        interval = hf.get("no_rope_layer_interval", 4)
        ropes = [int((i + 1) % interval != 0) for i in range(count)]
    window = hf.get("sliding_window") if hf.get("use_sliding_window", False) else None
    types = hf.get("layer_types") or ["full_attention" if r else "sliding_attention" for r in ropes]
    bias = bool(hf.get("attention_bias", False))
    return base(
        hf,
        default_theta=2000000.0,
        layers=tuple(
            LayerConfig(window=w, rope=bool(r))
            for w, r in zip(windows({"layer_types": types}, count, window), ropes[:count], strict=True)
        ),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        tied=bool(hf.get("tie_word_embeddings", True)),
    )
