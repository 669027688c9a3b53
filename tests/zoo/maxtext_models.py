"""MaxText's models as its configs make them, in tiny sizes: parameters stacked along axis 1, experts by megablox."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import maxtext
from flax import nnx
from maxtext.common.common_types import MODEL_MODE_AUTOREGRESSIVE
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils, model_creation_utils
from measure import VOCAB, Model, model, tokens

import awq_jax

TINY: dict[str, Any] = {
    "run_name": "zoo", "enable_checkpointing": False, "skip_jax_distributed_system": True, "log_config": False,
    "base_emb_dim": 64, "base_num_query_heads": 4, "base_num_kv_heads": 2, "base_mlp_dim": 128, "head_dim": 16,
    "base_num_decoder_layers": 2, "vocab_size": VOCAB, "max_target_length": 64, "max_prefill_predict_length": 32,
    "dtype": "float32", "weight_dtype": "float32", "attention": "dot_product", "per_device_batch_size": 1,
}  # fmt: skip
BASE = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
LLAMA = {
    "self_attention/query": {"pre_self_attention_layer_norm"},
    "self_attention/out": {"self_attention/value"},
    "mlp/wi_0": {"post_self_attention_layer_norm"},
    "mlp/wo": {"mlp/wi_1"},
}
# As AutoAWQ and llm-compressor scale Mixtral and DeepSeek: what the router reads is scaled for the experts.
MOE = {
    "MoeBlock_0/gate": {"post_self_attention_layer_norm"},
    "MoeBlock_0/wi_0": {"post_self_attention_layer_norm"},
    "MoeBlock_0/wo": {"MoeBlock_0/wi_1"},
}


def maxtext_model(settings: dict[str, Any], folds: dict[str, set[str]]) -> Model:
    """A model of MaxText by settings of its base.yml."""
    config = pyconfig.initialize(["zoo", BASE], **TINY | settings)
    mesh = maxtext_utils.get_mesh_from_config(config)
    jax.set_mesh(mesh)  # for the rest of the process, as MaxText's programs have it around all their work
    made = model_creation_utils.from_config(config, mesh=mesh, rngs=nnx.Rngs(0))
    apply_fn, params = awq_jax.nnx.functional(made)

    def fn(params: Any, ids: jax.Array) -> Any:
        places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return apply_fn(params, ids, places, jnp.ones_like(ids), enable_dropout=False)

    def decode(bind: Any, params: Any, ids: jax.Array) -> jax.Array:
        mode = MODEL_MODE_AUTOREGRESSIVE
        serving = model_creation_utils.from_config(config, mesh=mesh, rngs=nnx.Rngs(0), model_mode=mode)
        graph, _, cache, rest = nnx.split(serving, nnx.Param, nnx.Cache, ...)

        def one(params: Any, token: jax.Array, cache: Any, at: jax.Array) -> tuple[jax.Array, Any]:
            merged = nnx.merge(graph, params, cache, rest, copy=True)
            logits = merged(token, at, enable_dropout=False, model_mode=mode)
            return logits, nnx.state(merged, nnx.Cache)

        step, logits = bind(one), []
        for at in range(ids.shape[1]):
            found, cache = step(params, ids[:, at : at + 1], cache, jnp.full((len(ids), 1), at))
            logits.append(found)
        return jnp.concatenate(logits, 1)

    return Model(fn, params, lambda seed: (tokens(seed),), folds, decode)


@model
def maxtext_llama2() -> Model:
    return maxtext_model({"decoder_block": "llama2"}, LLAMA)


@model
def maxtext_llama2_unrolled() -> Model:
    return maxtext_model({"decoder_block": "llama2", "scan_layers": False}, LLAMA)


@model
def maxtext_mixtral() -> Model:
    return maxtext_model(
        {"decoder_block": "mixtral", "num_experts": 4, "num_experts_per_tok": 2, "base_moe_mlp_dim": 128},
        MOE
        | {"self_attention/query": {"pre_self_attention_layer_norm"}, "self_attention/out": {"self_attention/value"}},
    )


@model
def maxtext_deepseek() -> Model:
    return maxtext_model(
        {
            "decoder_block": "deepseek", "attention_type": "mla", "num_experts": 4, "num_experts_per_tok": 2,
            "base_moe_mlp_dim": 64, "first_num_dense_layers": 1, "shared_experts": 1, "base_num_decoder_layers": 3,
            "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
            "base_num_kv_heads": 4, "routed_bias": True, "routed_score_func": "sigmoid",
            "mla_naive_kvcache": False,
        },
        MOE
        | {
            "wq_a": {"pre_self_attention_layer_norm"},
            "wq_b": {"q_norm"},
            "wkv_b": {"kv_norm"},
            "self_attention/out": {"wkv_b"},
            "shared_experts/wi_0": {"moe_layers/post_self_attention_layer_norm"},
            "shared_experts/wo": {"shared_experts/wi_1"},
            "dense_layers/mlp/wi_0": {"dense_layers/post_self_attention_layer_norm"},
            "dense_layers/mlp/wo": {"dense_layers/mlp/wi_1"},
        },
    )  # fmt: skip


@model
def maxtext_gemma2() -> Model:
    settings = {"decoder_block": "gemma2", "logits_via_embedding": True, "base_num_decoder_layers": 4}
    return dataclasses.replace(maxtext_model(settings, {}), apart=True)
