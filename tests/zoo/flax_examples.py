"""Flax's own examples, of its sources: lm1b and wmt in Linen, gemma in NNX; each with its own cache."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from measure import VOCAB, Model, model, tokens

import awq_jax

EXAMPLES = Path(sys.prefix) / "source" / "examples"
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "output_vocab_size": VOCAB, "emb_dim": 64, "num_heads": 4, "num_layers": 2, "qkv_dim": 64,
    "mlp_dim": 128, "max_len": 64,
}  # fmt: skip


def _models_of(example: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{example}_models", EXAMPLES / example / "models.py")
    assert spec is not None
    assert spec.loader is not None
    found = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@model
def flax_lm1b() -> Model:
    found = _models_of("lm1b")
    config = found.TransformerConfig(**SIZES, deterministic=True)
    made = found.TransformerLM(config)
    params = nn.unbox(made.init(jax.random.key(0), tokens(0)))["params"]

    def decode(bind: Any, params: Any, ids: jax.Array) -> jax.Array:
        one_by_one = found.TransformerLM(config.replace(decode=True))
        cache = one_by_one.init(jax.random.key(0), jnp.ones_like(ids))["cache"]
        step = bind(lambda p, cache, token: one_by_one.apply({"params": p, "cache": cache}, token, mutable=["cache"]))
        shifted = jnp.concatenate([jnp.zeros_like(ids[:, :1]), ids[:, :-1]], 1)  # as the model itself does elsewhere
        logits = []
        for t in range(ids.shape[1]):
            one, changed = step(params, cache, shifted[:, t : t + 1])
            cache = changed["cache"]
            logits.append(one)
        return jnp.concatenate(logits, 1)

    folds = {"MlpBlock_0/Dense_0": {"LayerNorm_1/scale", "LayerNorm_1/bias"}}
    return Model(
        lambda p, ids: made.apply({"params": p}, ids), params, lambda seed: (tokens(seed, low=1),), folds, decode
    )


@model
def flax_wmt() -> Model:
    found = _models_of("wmt")
    config = found.TransformerConfig(**SIZES, share_embeddings=True, deterministic=True)
    made = found.Transformer(config)

    def batch(seed: int) -> tuple[Any, ...]:
        return tokens(seed, low=1), tokens(seed + 50, (8, 24), low=1)

    params = nn.unbox(made.init(jax.random.key(0), *batch(0)))["params"]
    folds = {"encoderblock_0/MlpBlock_0/Dense_0": {"LayerNorm_1/scale", "LayerNorm_1/bias"}}

    def decode(bind: Any, params: Any, source: jax.Array, ids: jax.Array) -> jax.Array:
        one_by_one = found.Transformer(config.replace(decode=True))
        cache = one_by_one.init(jax.random.key(0), jnp.ones_like(source), jnp.ones_like(ids))["cache"]
        encode = bind(lambda p, source: one_by_one.apply({"params": p}, source, method="encode"))

        def one(p: Any, cache: Any, encoded: jax.Array, source: jax.Array, token: jax.Array) -> Any:
            given = (encoded, source, token)
            return one_by_one.apply({"params": p, "cache": cache}, *given, mutable=["cache"], method="decode")

        step, encoded, logits = bind(one), encode(params, source), []
        shifted = jnp.concatenate([jnp.zeros_like(ids[:, :1]), ids[:, :-1]], 1)  # as the model itself does elsewhere
        for t in range(ids.shape[1]):
            found_here, changed = step(params, cache, encoded, source, shifted[:, t : t + 1])
            cache = changed["cache"]
            logits.append(found_here)
        return jnp.concatenate(logits, 1)

    return Model(lambda p, source, target: made.apply({"params": p}, source, target), params, batch, folds, decode)


@model
def flax_gemma() -> Model:
    sys.path.insert(0, str(EXAMPLES / "gemma"))
    found, configs = importlib.import_module("transformer"), importlib.import_module("transformer_cfg")
    config = configs.TransformerConfig(
        num_layers=2, num_embed=VOCAB, embed_dim=64, hidden_dim=128, num_heads=4, head_dim=16, num_kv_heads=2,
        final_logit_softcap=None, use_post_attn_norm=True, use_post_ffw_norm=True, use_qk_norm=True,
        attention_types=(configs.AttentionType.LOCAL_SLIDING, configs.AttentionType.GLOBAL), sliding_window_size=16,
    )  # fmt: skip
    made = found.Transformer(config, rngs=nnx.Rngs(0))
    made.eval()
    apply_fn, params = awq_jax.nnx.functional(made)

    def fn(params: Any, ids: jax.Array) -> Any:
        b, t = ids.shape
        places = jnp.broadcast_to(jnp.arange(t), (b, t))
        return apply_fn(params, ids, places, None, jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t)))[0]

    def decode(bind: Any, params: Any, ids: jax.Array) -> jax.Array:
        b, t = ids.shape
        step, cache, logits = bind(apply_fn), made.init_cache(t, b), []
        for at in range(t):
            mask = jnp.broadcast_to(jnp.arange(t) <= at, (b, 1, t))
            one, cache = step(params, ids[:, at : at + 1], jnp.full((b, 1), at), cache, mask)
            logits.append(one)
        return jnp.concatenate(logits, 1)

    folds = {"mlp/gate_proj": {"pre_ffw_norm"}, "mlp/down_proj": {"up_proj"}}
    return Model(fn, params, lambda seed: (tokens(seed),), folds, decode)
