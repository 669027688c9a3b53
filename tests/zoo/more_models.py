"""Models of packages that nobody here had looked at before they were tried; see `make_envs.sh`, environment "more".

What absorbs the scales was written down from the models' sources, before a plan was looked at.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measure import VOCAB, Model, model, tokens

import awq_jax


@model
def mamba2() -> Model:
    from mamba2_jax import modeling

    config = modeling.Mamba2Config(
        vocab_size=VOCAB, hidden_size=64, state_size=16, head_dim=16, chunk_size=32, num_hidden_layers=2
    )
    made = modeling.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    fn, params = awq_jax.nnx.functional(made)

    def decode(bind: Any, params: Any, ids: jax.Array) -> jax.Array:
        cache = modeling.create_empty_cache(config, len(ids))
        step = bind(lambda params, token, cache: fn(params, token, cache=cache))
        logits = []
        for at in range(ids.shape[1]):
            out = step(params, ids[:, at : at + 1], cache)
            cache = out["cache"]
            logits.append(out["logits"])
        return jnp.concatenate(logits, 1)

    folds = {"mixer/in_proj": {"norm/weight"}, "mixer/out_proj": {"mixer/norm/weight"}}
    return Model(lambda p, ids: fn(p, ids)["logits"], params, lambda seed: (tokens(seed),), folds, decode)


@model
def nano_moe() -> Model:
    from nano_moe.config import NanoMoEConfig
    from nano_moe.model import NanoMoE

    made = NanoMoE(NanoMoEConfig(vocab_size=VOCAB, n_layers=2, n_heads=4, d_model=64, d_ff=128, block_size=64))
    params = made.init(jax.random.key(0), tokens(0))["params"]
    norm = {"LayerNorm_1/scale", "LayerNorm_1/bias"}
    folds = {
        "MultiHeadAttention_0/Dense_0": {"LayerNorm_0/scale", "LayerNorm_0/bias"},
        "MultiHeadAttention_0/Dense_1": {"MultiHeadAttention_0/Dense_0/kernel", "MultiHeadAttention_0/Dense_0/bias"},
        "expert_0/Dense_0": norm,
        "expert_3/Dense_0": norm,
        "expert_0/Dense_1": set(),
    }
    return Model(lambda p, ids: made.apply({"params": p}, ids)[0], params, lambda seed: (tokens(seed),), folds)


@model
def timesfm() -> Model:
    from timesfm import configs
    from timesfm.flax import util
    from timesfm.timesfm_2p5 import timesfm_2p5_base, timesfm_2p5_flax

    block = functools.partial(configs.ResidualBlockConfig, hidden_dims=64, use_bias=False, activation="swish")
    whole = timesfm_2p5_base.TimesFM_2p5_200M_Definition()
    layer = dataclasses.replace(whole.stacked_transformers.transformer, model_dims=64, hidden_dims=128, num_heads=4)

    class Tiny(timesfm_2p5_flax.TimesFM_2p5_200M_flax_module):
        config = dataclasses.replace(
            whole,
            tokenizer=dataclasses.replace(whole.tokenizer, hidden_dims=64, output_dims=64),
            stacked_transformers=configs.StackedTransformersConfig(num_layers=2, transformer=layer),
            output_projection_point=block(input_dims=64, output_dims=64),
            output_projection_quantiles=block(input_dims=64, output_dims=512),
        )

    made = Tiny()
    fn, params = awq_jax.nnx.functional(made)

    def call(params: Any, series: jax.Array, missing: jax.Array) -> Any:
        """With a cache, as its own `decode` calls it; without one it does not run under this Flax."""
        b, t, _ = series.shape
        counts, room = jnp.zeros((2, b), jnp.int32), jnp.zeros((2, b, t, made.h, made.hd))
        cache = util.DecodeCache(next_index=counts, num_masked=counts, key=room, value=room)
        return fn(params, series, missing, cache)[0][2]

    def batch(seed: int) -> tuple[Any, ...]:
        series = np.random.default_rng(seed).normal(size=(8, 24, 32)).cumsum(axis=2) / 4
        return jnp.asarray(series, jnp.float32), jnp.zeros((8, 24, 32), bool)

    folds = {
        "attn/query": {"pre_attn_ln"},
        "attn/out": {"attn/value"},
        "ff0": {"pre_ff_ln"},
        "ff1": set(),
        "output_projection_point/hidden_layer": set(),
    }
    return Model(call, params, batch, folds)


@model
def wan() -> Model:
    from vidax.core.rope3d import create_rope3d_freqs
    from vidax.models.wan.wan2_1.dit import WanDiT

    made = WanDiT(
        dim=64, ffn_dim=128, num_heads=4, num_layers=2, freq_dim=64, text_dim=64, text_len=16, compute_dtype=jnp.float32
    )
    freqs = create_rope3d_freqs(2, 4, 4, 16)

    def batch(seed: int) -> tuple[Any, ...]:
        rng = np.random.default_rng(seed)
        latents = rng.normal(size=(2, 2, 8, 8, 16)).cumsum(axis=3) / 3
        return tuple(
            jnp.asarray(a, jnp.float32)
            for a in (latents, rng.uniform(0, 1000, 2), rng.normal(size=(2, 16, 64)).cumsum(axis=1) / 3)
        )

    x, t, text = batch(0)
    params = made.init(jax.random.key(0), x, t, freqs, text)["params"]
    folds = {
        "blocks_0/self_attn_q": set(),  # what its norm is multiplied by is computed from the time
        "blocks_0/self_attn_o": {"blocks_0/self_attn_v/kernel", "blocks_0/self_attn_v/bias"},
        "blocks_0/cross_attn_q": {"blocks_0/norm3/scale", "blocks_0/norm3/bias"},
        "blocks_0/cross_attn_k": {"text_embedding_2/kernel", "text_embedding_2/bias"},
        "blocks_0/cross_attn_o": {"blocks_0/cross_attn_v/kernel", "blocks_0/cross_attn_v/bias"},
        "blocks_0/ffn_2": set(),
    }
    return Model(lambda p, x, t, text: made.apply({"params": p}, x, t, freqs, text), params, batch, folds)


def _of_gemma(made: Any, folds: dict[str, set[str]]) -> Model:
    """A model of the `gemma` package: logits of its output, decoded with its cache."""
    rng = np.random.default_rng(0)

    def filled(path: Any, a: jax.Array) -> jax.Array:
        """Where it begins with zeros, and would answer with zeros: something near one in norms, anything elsewhere."""
        mean = float("norm" in jax.tree_util.keystr(path) or path[-1].key == "scale")
        return a if np.any(a) else jnp.asarray(mean + 0.1 * rng.normal(size=a.shape), a.dtype)

    params = jax.tree_util.tree_map_with_path(filled, made.init(jax.random.key(0), tokens(0))["params"])

    def decode(bind: Any, params: Any, ids: jax.Array) -> jax.Array:
        b, t = ids.shape
        cache: Any = made.init_cache(batch_size=b, dtype=jnp.float32, cache_length=t)

        def one(params: Any, token: jax.Array, cache: Any, at: jax.Array, mask: jax.Array) -> Any:
            out = made.apply({"params": params}, token, positions=at, cache=cache, attention_mask=mask)
            return out.logits, out.cache

        step, logits = bind(one), []
        for at in range(t):
            mask = jnp.broadcast_to(jnp.arange(t) <= at, (b, 1, t))
            found, cache = step(params, ids[:, at : at + 1], cache, jnp.full((b, 1), at), mask)
            logits.append(found)
        return jnp.concatenate(logits, 1)

    def fn(params: Any, ids: jax.Array) -> Any:
        return made.apply({"params": params}, ids).logits

    return Model(fn, params, lambda seed: (tokens(seed, low=1),), folds, decode)


GEMMA4: dict[str, Any] = {
    "num_embed": VOCAB, "embed_dim": 64, "hidden_dim": 128, "num_heads": 4, "head_dim": 32, "num_kv_heads": 2,
    "final_logit_softcap": 30.0, "use_post_attn_norm": True, "use_post_ffw_norm": True, "sliding_window_size": 16,
}  # fmt: skip


ROPE = {"local_rope_proportion": 1.0, "global_rope_proportion": 0.25}


@model
def gemma4_moe() -> Model:
    from gemma.gm.nn.gemma4 import _config, _modules, _transformer

    kinds = (_modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL)
    config = _config.TransformerConfig(
        **GEMMA4, **ROPE, attention_types=kinds, num_global_kv_heads=1, global_key_size=64, k_eq_v_global=True,
        enable_moe=True, moe_dense_hidden_dim=128, num_experts=4, expert_dim=64, top_k_experts=2,
    )  # fmt: skip
    folds = {
        "layer_0/attn/q_einsum": {"layer_0/pre_attention_norm/scale"},
        "layer_1/attn/k_einsum": {"layer_1/pre_attention_norm/scale"},
        "layer_0/attn/attn_vec_einsum": set(),  # values have a norm of each head
        "layer_0/mlp2/gating_einsum": {"layer_0/pre_ffw2_norm/scale"},
        "layer_0/mlp2/linear": {"layer_0/mlp2/gating_einsum"},
        "layer_0/mlp/gating_einsum": set(),  # the router's norm reads the same
        # Short of what was written down, the gating's second half: the plan takes index 1 of the axis that its columns
        # are split into for another row.
        "layer_0/mlp/linear": set(),
    }
    return _of_gemma(_transformer.Transformer(config=config, dtype=jnp.float32), folds)


@model
def gemma4_per_layer() -> Model:
    from gemma.gm.nn.gemma4 import _config, _modules, _transformer

    kinds = (_modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL) * 2
    shared = _config.KVCacheSharingConfig(frac_shared_layers=0.5, share_global=True, share_local=True)
    config = _config.TransformerConfig(
        **GEMMA4, **ROPE, attention_types=kinds, per_layer_input_dim=32, kv_cache_sharing_config=shared,
        override_kv_shared_ffw_hidden=256,
    )  # fmt: skip
    folds = {
        "layer_0/attn/q_einsum": {"layer_0/pre_attention_norm/scale"},
        "layer_0/mlp/gating_einsum": {"layer_0/pre_ffw_norm/scale"},
        "layer_0/mlp/linear": {"layer_0/mlp/gating_einsum"},
        "layer_0/per_layer_input_gate": set(),  # reads the residual stream
    }
    return _of_gemma(_transformer.Transformer(config=config, dtype=jnp.float32), folds)


@model
def gemma3n() -> Model:
    from gemma.gm.nn.gemma3n import _config, _modules, _transformer

    kinds = (_modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL) * 2
    shared = _config.KVCacheSharingConfig(frac_shared_layers=0.5, share_global=True, share_local=True)
    config = _config.TransformerConfig(
        **GEMMA4, attention_types=kinds, query_pre_attn_norm=_config.QueryPreAttentionNormalisation.NONE,
        use_qk_norm=True, use_value_norm=True, transpose_gating_einsum=True, use_altup=True, altup_coef_clip=120.0,
        activation_sparsity_pattern=(0.95, 0.95, 0.0, 0.0), per_layer_input_dim=32, use_laurel=True, laurel_rank=32,
        kv_cache_sharing_config=shared, scale_plus_one=False,
    )  # fmt: skip
    folds = {
        "layer_0/attn/q_einsum": set(),  # what its norm makes goes into the residual stream as well
        "layer_0/mlp/gating_einsum": {"layer_0/pre_ffw_norm/scale"},
        "layer_0/mlp/linear": {"layer_0/mlp/gating_einsum"},
    }
    return _of_gemma(_transformer.Gemma3nTransformer(config=config, dtype=jnp.float32), folds)
