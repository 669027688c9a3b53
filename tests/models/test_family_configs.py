"""Config keys as published: what they mean, and what is refused instead of ignored."""

from __future__ import annotations

import numpy as np
import pytest
import torch_references

from awq_jax import models
from awq_jax.errors import ConfigError, UnsupportedModelError
from awq_jax.models.families import olmo3
from awq_jax.models.layers import attention

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MPT = {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 64}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 64}
OPT = {k: v for k, v in LLAMA.items() if k != "intermediate_size"} | {"model_type": "opt", "ffn_dim": 64}
QWEN = LLAMA | {"model_type": "qwen", "kv_channels": 8, "seq_length": 16}


@pytest.mark.parametrize(
    ("hf", "culprit"),
    [
        (MPT | {"no_bias": False}, "no_bias"),
        (MPT | {"logit_scale": "inv_sqrt_d_model"}, "logit_scale"),
        (MPT | {"attn_config": {"alibi": False}}, "alibi"),
        (MPT | {"attn_config": {"qk_ln": True}}, "qk_ln"),
        (LLAMA | {"model_type": "minicpm", "num_experts": 8}, "num_experts"),
        (LLAMA | {"model_type": "minicpm", "sparse_config": {"topk": 64}}, "sparse_config"),
        (QWEN | {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        (QWEN | {"visual": {"layers": 48}}, "visual"),
    ],
)
def test_what_would_change_the_result_is_refused(hf, culprit):
    with pytest.raises(UnsupportedModelError, match=culprit):
        models.config_from_hf(hf)


def test_one_rope_is_found_under_types_of_layers_and_two_are_refused():
    hf, rope = LLAMA | {"model_type": "llama"}, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    nested = {"full_attention": rope, "sliding_attention": dict(rope)}
    assert models.config_from_hf(hf | {"rope_parameters": nested}) == models.config_from_hf(
        hf | {"rope_parameters": rope}
    )
    nested["sliding_attention"]["rope_theta"] = 1e4
    with pytest.raises(UnsupportedModelError, match="full_attention, sliding_attention"):
        models.config_from_hf(hf | {"rope_parameters": nested})
    with pytest.raises(ConfigError, match="factor of rope scaling 'linear' must be positive; got 0"):
        models.config_from_hf(hf | {"rope_parameters": rope | {"factor": 0}})


@pytest.mark.parametrize(
    "hf",
    [
        OPT,
        MPT,
        GPT2 | {"model_type": "gpt2"},
        GPT2 | {"model_type": "gptj", "rotary_dim": 4},
        GPT2 | {"model_type": "gpt_bigcode"},
        {"model_type": "bloom", "hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64},
    ],
    ids=lambda hf: hf["model_type"],
)
def test_keys_of_other_families_change_nothing(hf):
    assert models.config_from_hf(hf | {"num_key_value_heads": 2, "intermediate_size": 48}) == models.config_from_hf(hf)


def test_exaone4_with_a_spelled_out_pattern_needs_the_layers():
    hf = LLAMA | {"model_type": "exaone4", "sliding_window": 8, "sliding_window_pattern": "LLLG"}
    with pytest.raises(ConfigError, match="layer_types"):
        models.config_from_hf(hf)
    types = ["sliding_attention"] * 3 + ["full_attention"]
    spelled = models.config_from_hf(hf | {"layer_types": types})
    assert spelled == models.config_from_hf(hf | {"sliding_window_pattern": 4})
    assert [layer.window for layer in spelled.layers] == [8, 8, 8, None]
    assert [layer.rope is None for layer in spelled.layers] == [False, False, False, True]


def test_cohere2_counts_its_layers_in_fours():
    config = models.config_from_hf(LLAMA | {"model_type": "cohere2", "sliding_window": 8})
    assert [layer.window for layer in config.layers] == [8, 8, 8, None]
    old = models.config_from_hf(LLAMA | {"model_type": "cohere2", "sliding_window": 8, "sliding_window_pattern": 2})
    assert [layer.window for layer in old.layers] == [8, None, 8, None]


def test_olmo3_stretches_only_layers_without_a_window():
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8}
    old = LLAMA | {"model_type": "olmo3", "rope_theta": 5e5, "rope_scaling": yarn}
    each = {"full_attention": yarn | {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 5e5}}
    config = olmo3.config(old)
    assert config == olmo3.config(LLAMA | {"model_type": "olmo3", "rope_parameters": each})
    assert [layer.rope.kind for layer in config.layers] == ["default", "default", "default", "yarn"]


def test_qwen_ends_where_it_would_change_with_the_length():
    """Both changes are on unless the config says otherwise."""
    assert models.config_from_hf(QWEN).max_length == 16
    assert models.config_from_hf(QWEN | {"use_dynamic_ntk": False}).max_length == 16
    plain = models.config_from_hf(QWEN | {"use_dynamic_ntk": False, "use_logn_attn": False})
    assert plain.max_length == 64
    first = {"n_embd": 32, "ffn_hidden_size": 48, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 64}
    assert models.config_from_hf(first | {"model_type": "qwen", "kv_channels": 8, "seq_length": 16}).max_length == 16


@pytest.mark.parametrize(
    ("keys", "rotates", "normalised"),
    [
        ({"vocab_size": 64000, "hidden_size": 4096, "max_position_embeddings": 4096}, True, False),
        ({"vocab_size": 64000, "hidden_size": 5120, "num_attention_heads": 40, "model_max_length": 4096}, False, False),
        ({"vocab_size": 125696, "hidden_size": 4096, "max_position_embeddings": 4096}, True, True),
        ({"vocab_size": 125696, "hidden_size": 5120, "num_attention_heads": 40, "z_loss_weight": 0}, False, True),
    ],
)
def test_the_sizes_of_baichuan(keys, rotates, normalised):
    hf = {"model_type": "baichuan", "num_attention_heads": 32, "num_hidden_layers": 1, "intermediate_size": 11008}
    config = models.config_from_hf(hf | keys)
    layer = config.layers[0]
    assert (layer.rope is not None, layer.attention.alibi is None) == (rotates, rotates)
    assert (config.head_norm, config.max_length) == (normalised, 4096)


@pytest.mark.parametrize(("heads", "steepness"), [(4, 16.0), (6, 16.0), (6, 8.0), (40, 8.0)])
def test_alibi_of_another_steepness(heads, steepness):
    """MPT takes the series of the next power of two, every other member first (its StoryWriter: 16)."""
    power = 1 << (heads - 1).bit_length()
    series = 2.0 ** (-steepness * np.arange(1, power + 1) / power)
    slopes = series if power == heads else np.concatenate([series[1::2], series[::2]])[:heads]
    ours = attention.alibi(heads, 5, "float32", steepness)
    np.testing.assert_allclose(ours, slopes[:, None] * np.arange(5), rtol=1e-6)
    if steepness == 8:
        np.testing.assert_allclose(torch_references.slopes(heads), slopes, rtol=1e-12)
    hf = MPT | {"attn_config": {"alibi_bias_max": steepness}}
    assert models.config_from_hf(hf).layers[0].attention.alibi_max == steepness


def test_internlm3_has_two_spellings_of_its_biases():
    hf = LLAMA | {"model_type": "internlm3"}
    published = models.config_from_hf(hf | {"qkv_bias": True, "bias": False})
    layer = published.layers[0]
    assert (layer.attention.qkv_bias, layer.attention.o_bias, layer.mlp.bias) == (True, False, False)
    assert published == models.config_from_hf(hf | {"attention_bias": True, "mlp_bias": False})


def test_queries_grow_with_their_position():
    hf = LLAMA | {"model_type": "ministral3", "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
    assert models.config_from_hf(hf).layers[0].attention.query_growth is None
    hf["rope_parameters"] |= {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}
    assert models.config_from_hf(hf).layers[0].attention.query_growth == (0.1, 8)


@pytest.mark.parametrize("kind", models.supported())
def test_the_epsilon_of_norms_that_a_config_leaves_out_is_transformers(kind):
    transformers = pytest.importorskip("transformers")
    try:
        full = transformers.AutoConfig.for_model(kind).to_dict()
        said = models.config_from_hf(full)
    except (ValueError, ConfigError, UnsupportedModelError):
        return  # a family that transformers has not, or whose defaults are no model
    spelled = ("norm_eps", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    assert models.config_from_hf({k: v for k, v in full.items() if k not in spelled}).norm == said.norm


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("llama", "mlp_bias"),
        ("granite", "attention_bias"),
        ("stablelm", "qk_layernorm"),
        ("smollm3", "use_sliding_window"),
    ],
)
def test_a_switch_that_is_a_word_is_refused(model_type: str, key: str) -> None:
    """``"false"`` is true in Python: it would turn on what it turns off."""
    with pytest.raises(ConfigError, match=f"{key} must be true or false"):
        models.config_from_hf(LLAMA | {"model_type": model_type, key: "false"})
