"""The models, each in a tiny configuration; what is imported is in the environment that `make_envs.sh` makes for it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import VOCAB, Model, model, tokens

SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def _of_transformers(name: str, config: Any) -> Model:
    import transformers

    made = getattr(transformers, name)(config)

    def fn(params: Any, ids: jax.Array) -> Any:
        return made(ids, params=params, train=False, return_dict=False)[0]

    def decode(bind: Any, params: Any, ids: jax.Array) -> jax.Array:
        def one(params: Any, token: jax.Array, cache: Any, at: jax.Array) -> Any:
            known = {"past_key_values": cache, "attention_mask": jnp.ones_like(ids), "position_ids": at}
            return made(token, params=params, train=False, return_dict=False, **known)[:2]

        step, cache, logits = bind(one), made.init_cache(*ids.shape), []
        for at in range(ids.shape[1]):
            found, cache = step(params, ids[:, at : at + 1], cache, jnp.full((len(ids), 1), at))
            logits.append(found)
        return jnp.concatenate(logits, 1)

    return Model(fn, made.params, lambda seed: (tokens(seed),), decode=decode)


@model
def hf_llama() -> Model:
    from transformers import LlamaConfig

    config = LlamaConfig(**SMALL, intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=False)
    made = _of_transformers("FlaxLlamaForCausalLM", config)
    folds = {
        "self_attn/q_proj": {"input_layernorm"},
        "self_attn/o_proj": {"v_proj"},
        "mlp/gate_proj": {"post_attention_layernorm"},
        "mlp/down_proj": {"up_proj"},
    }
    return dataclasses.replace(made, folds=folds)


@model
def hf_gpt2() -> Model:
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    made = _of_transformers("FlaxGPT2LMHeadModel", config)
    return dataclasses.replace(made, folds={"attn/c_attn": {"ln_1/bias", "ln_1/scale"}})


@model
def hf_t5() -> Model:
    from transformers import T5Config

    config = T5Config(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    import transformers

    plain = jnp.clip  # transformers names its bound as JAX did up to 0.4
    jnp.clip = lambda x, *bounds, a_max=None, **named: plain(
        x, *bounds, **({"max": a_max} if a_max is not None else named)
    )
    made = transformers.FlaxT5ForConditionalGeneration(config)

    def fn(params: Any, ids: jax.Array, target: jax.Array) -> Any:
        return made(ids, decoder_input_ids=target, params=params, train=False, return_dict=False)[0]

    folds = {"DenseReluDense/wi": {"layer_norm"}}
    batch = functools.partial(_source_and_target, (8, 24))
    return Model(fn, made.params, batch, folds, functools.partial(_decode_from_encoder, made))


def _source_and_target(shape: tuple[int, int], seed: int) -> tuple[jax.Array, jax.Array]:
    return tokens(seed), tokens(seed + 50, shape)


def _decode_from_encoder(made: Any, bind: Any, params: Any, source: jax.Array, ids: jax.Array) -> jax.Array:
    """The decoder of a model of transformers, token by token; the encoder once."""
    settings = {"train": False, "return_dict": False}
    encoded = bind(lambda params, source: made.encode(source, params=params, **settings))(params, source)
    cache: Any = made.init_cache(*ids.shape, encoded)
    places = {"decoder_position_ids"} & set(inspect.signature(made.decode).parameters)

    def one(params: Any, encoded: Any, token: jax.Array, cache: Any, at: jax.Array) -> Any:
        known = {"past_key_values": cache, "decoder_attention_mask": jnp.ones_like(ids)} | dict.fromkeys(places, at)
        return made.decode(token, encoded, params=params, **known, **settings)[:2]

    step, logits = bind(one), []
    for at in range(ids.shape[1]):
        found, cache = step(params, encoded, ids[:, at : at + 1], cache, jnp.full((len(ids), 1), at))
        logits.append(found)
    return jnp.concatenate(logits, 1)


@model
def hf_whisper() -> Model:
    from transformers import FlaxWhisperForConditionalGeneration, WhisperConfig

    config = WhisperConfig(
        vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=32, max_source_positions=50,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    made = FlaxWhisperForConditionalGeneration(config, input_shape=(1, 32, 100))

    def fn(params: Any, features: jax.Array, ids: jax.Array) -> Any:
        return made(features, ids, params=params, train=False, return_dict=False)[0]

    def batch(seed: int) -> tuple[Any, ...]:
        sound = np.random.default_rng(seed).normal(size=(8, 32, 100)).cumsum(axis=2) / 5
        return jnp.asarray(sound, jnp.float32), tokens(seed, (8, 24))

    return Model(fn, made.params, batch, decode=functools.partial(_decode_from_encoder, made))


@model
def hf_clip() -> Model:
    from transformers import CLIPVisionConfig, FlaxCLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    made = FlaxCLIPVisionModel(config)

    def batch(seed: int) -> tuple[Any, ...]:
        image = np.random.default_rng(seed).normal(size=(16, 3, 32, 32)).cumsum(axis=3) / 4
        return (jnp.asarray(image, jnp.float32),)

    return Model(
        lambda p, x: made(x, params=p, train=False, return_dict=False)[0],
        made.params,
        batch,
        {"mlp/fc1": {"layer_norm2/scale", "layer_norm2/bias"}},
    )


@model
def keras_hub_llama() -> Model:
    import keras
    import keras_hub

    import awq_jax

    keras.utils.set_random_seed(0)
    made = keras_hub.models.LlamaBackbone(
        vocabulary_size=VOCAB,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=64,
        intermediate_dim=128,
    )
    fn, params = awq_jax.keras.functional(made)

    def batch(seed: int) -> tuple[Any, ...]:
        ids = tokens(seed)
        return ({"token_ids": ids, "padding_mask": jnp.ones_like(ids, bool)},)

    def decode(bind: Any, params: Any, given: Any) -> jax.Array:
        """What it is given to make a text: the layers of the same backbone with its cache."""
        ids = given["token_ids"]
        names = {v.path: v for v in made.variables}
        lm = keras_hub.models.LlamaCausalLM(backbone=made, preprocessor=None)

        def one(params: Any, token: jax.Array, cache: jax.Array, at: jax.Array) -> Any:
            with keras.StatelessScope(state_mapping=[(names[path], a) for path, a in params.items()]):
                return lm.call_with_cache(token, cache, at)[1:]

        step, features = bind(one), []
        cache = jnp.zeros((len(ids), 2, 2, ids.shape[1], 2, 16))
        for at in range(ids.shape[1]):
            found, cache = step(params, ids[:, at : at + 1], cache, jnp.asarray(at))
            features.append(found)
        return jnp.concatenate(features, 1)

    return Model(fn, params, batch, decode=decode)


def _of_tunix(module: str, cls: str, config: Any) -> Model:
    from flax import nnx

    import awq_jax

    found = importlib.import_module(module)
    made = getattr(found, cls)(config(found), rngs=nnx.Rngs(0))
    fn, params = awq_jax.nnx.functional(made)

    def call(params: Any, ids: jax.Array) -> Any:
        b, t = ids.shape
        places = jnp.broadcast_to(jnp.arange(t), (b, t))
        return fn(params, ids, places, None, jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t)))[0]

    def decode(bind: Any, params: Any, ids: jax.Array) -> jax.Array:
        b, t = ids.shape
        dtype = jax.tree.leaves(nnx.state(made, nnx.Param))[0].dtype
        keys = jnp.zeros((b, t, made.config.num_kv_heads, made.config.head_dim), dtype)
        layer = {"k": keys, "v": keys, "end_index": jnp.zeros((b,), jnp.int32)}  # as tunix's sampler makes them
        cache: Any = {f"layer_{i}": layer for i in range(made.config.num_layers)}
        step, logits = bind(fn), []
        for at in range(t):
            mask = jnp.broadcast_to(jnp.arange(t) <= at, (b, 1, t))
            one, cache = step(params, ids[:, at : at + 1], jnp.full((b, 1), at), cache, mask)
            logits.append(one)
        return jnp.concatenate(logits, 1)

    return Model(call, params, lambda seed: (tokens(seed),), decode=decode)


@model
def tunix_llama3() -> Model:
    made = _of_tunix(
        "tunix.models.llama3.model",
        "Llama3",
        lambda m: m.ModelConfig(
            num_layers=2, vocab_size=VOCAB, embed_dim=64, hidden_dim=128, num_heads=4, head_dim=16, num_kv_heads=2,
            rope_theta=10000, norm_eps=1e-5, weight_tying=True,
        ),
    )  # fmt: skip
    folds = {"attn/q_proj": {"input_layernorm"}, "mlp/down_proj": {"up_proj"}, "attn/o_proj": {"v_proj"}}
    return dataclasses.replace(made, folds=folds)


@model
def tunix_qwen3_moe() -> Model:
    made = _of_tunix(
        "tunix.models.qwen3.model",
        "Qwen3",
        lambda m: m.ModelConfig(
            num_layers=2, vocab_size=VOCAB, embed_dim=64, hidden_dim=128, num_heads=4, head_dim=16, num_kv_heads=2,
            rope_theta=10000, norm_eps=1e-5, num_experts=4, num_experts_per_tok=2,
        ),
    )  # fmt: skip
    folds = {"mlp/gate_proj": {"post_attention_layernorm"}, "mlp/router": {"post_attention_layernorm"}}
    return dataclasses.replace(made, folds=folds | {"mlp/down_proj": {"up_proj"}, "attn/o_proj": {"v_proj"}})


@model
def tunix_gemma3() -> Model:
    return _of_tunix(
        "tunix.models.gemma3.model",
        "Gemma3",
        lambda m: m.ModelConfig(
            num_layers=2, num_embed=VOCAB, embed_dim=64, hidden_dim=128, num_heads=4, head_dim=16, num_kv_heads=2,
            sliding_window_size=16,
        ),
    )  # fmt: skip


@model
def recurrentgemma() -> Model:
    from recurrentgemma import common
    from recurrentgemma.jax import griffin

    kinds = (common.TemporalBlockType.RECURRENT, common.TemporalBlockType.ATTENTION)
    config = common.GriffinConfig(
        vocab_size=VOCAB, width=64, mlp_expanded_width=128, num_heads=2, lru_width=64, block_types=kinds,
        embeddings_scale_by_sqrt_dim=True, attention_window_size=32, logits_soft_cap=30.0,
    )  # fmt: skip
    made = griffin.Griffin(config)

    def places(ids: jax.Array) -> jax.Array:
        return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)

    params = made.init(jax.random.key(0), tokens(0), places(tokens(0)))["params"]

    def fn(params: Any, ids: jax.Array) -> Any:
        return made.apply({"params": params}, ids, places(ids))[0]

    def decode(bind: Any, params: Any, ids: jax.Array) -> jax.Array:
        cache: Any = made.init_cache(len(ids), jnp.float32)
        step = bind(lambda params, token, at, cache: made.apply({"params": params}, token, at, cache))
        logits = []
        for at in range(ids.shape[1]):
            one, cache = step(params, ids[:, at : at + 1], jnp.full((len(ids), 1), at), cache)
            logits.append(one)
        return jnp.concatenate(logits, 1)

    # Gates, which are not linear, read what linear_x makes, and linear_y's goes through gelu: nothing above linear_out.
    folds = {
        "recurrent_block/linear_x": {"temporal_pre_norm/scale"},
        "recurrent_block/linear_out": set(),
        "attention_block/proj_q": {"temporal_pre_norm/scale"},
        "attention_block/proj_final": {"attention_block/proj_v"},
        "mlp_block/ffw_up": {"channel_pre_norm/scale"},
        "mlp_block/ffw_down": {"mlp_block/ffw_up/w", "mlp_block/ffw_up/b"},
    }
    return Model(fn, params, lambda seed: (tokens(seed),), folds, decode)
