"""Llama for the engine, of its parts: its own has linears that take no quantization.

Imports the engine, and is imported by `awq_jax.vllm.plugin` alone.
"""

from __future__ import annotations

from typing import Any

import jax
from tpu_inference.layers.jax import JaxModule
from tpu_inference.models.jax.qwen3 import Qwen3ForCausalLM

from awq_jax.errors import BackendError


class Unchanged(JaxModule):
    """In place of the norms that Qwen 3 has for queries and keys."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class PackedLlamaForCausalLM(Qwen3ForCausalLM):
    """The engine's Qwen 3 without norms of queries and keys, which is Llama.

    Raises:
      BackendError: a Llama with biases, which Qwen 3 does not have.
    """

    def __init__(self, vllm_config: Any, rng_key: jax.Array, mesh: Any) -> None:
        config = vllm_config.model_config.hf_config
        biased = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
        if biased:
            raise BackendError(f"a Llama with {biased[0]} is not served packed by tpu-inference's JAX models")
        super().__init__(vllm_config, rng_key, mesh)
        for layer in self.model.layers:
            if hasattr(layer, "self_attn"):
                layer.self_attn.q_norm = layer.self_attn.k_norm = Unchanged()
