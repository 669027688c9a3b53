"""Which architectures there are, and what is said of those there are not."""

from __future__ import annotations

import family_cases
import multimodal
import peer_mappings
import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from awq_jax import models
from awq_jax.convert import config_json
from awq_jax.errors import UnsupportedModelError

# Every name in AutoAWQ 0.2.9's AWQ_CAUSAL_LM_MODEL_MAP (awq/models/auto.py).
AUTOAWQ = [
    "mpt",
    "llama",
    "opt",
    "RefinedWeb",
    "RefinedWebModel",
    "exaone",
    "falcon",
    "bloom",
    "gptj",
    "gpt_bigcode",
    "mistral",
    "mixtral",
    "gpt_neox",
    "aquila",
    "Yi",
    "qwen",
    "baichuan",
    "llava",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "stablelm",
    "starcoder2",
    "llava_next",
    "phi3",
    "phi3_v",
    "cohere",
    "deepseek_v2",
    "deepseek_v3",
    "minicpm",
    "internlm2",
    "minicpm3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen2_5_omni",
]


# What came after, and what AutoAWQ never had. Gemma 3 has a name for its text model alone.
LATER = "qwen2_moe qwen3_next gemma3_text gemma3 phi phimoe gpt2 cohere2 olmo2 olmoe granite glm4 smollm3 exaone4"
LATER += " internlm3 gpt_oss ministral qwen3_vl"


def test_every_family_of_autoawq_is_supported():
    assert len(AUTOAWQ) == 37
    assert set(AUTOAWQ) <= set(models.supported())
    assert set(AUTOAWQ) == set(peer_mappings.AUTOAWQ)


def test_the_families_that_came_after_are_supported():
    assert set(LATER.split()) <= set(models.supported())


def test_families_whose_configs_may_leave_out_that_their_heads_are_tied():
    """As transformers' classes have it, and the first releases' own (EXAONE, MiniCPM, Falcon as RefinedWeb)."""
    theirs = {f for f in models.supported() if f in CONFIG_MAPPING and f != "qwen2_5_omni"}
    tied = {f for f in theirs if getattr(CONFIG_MAPPING[f]().get_text_config(), config_json.TIED, False)}
    assert tied | {"exaone", "minicpm", "RefinedWeb", "RefinedWebModel"} == config_json.TIED_BY_DEFAULT


@pytest.mark.parametrize("said", [None, True, False])
def test_converters_and_decoder_agree_about_tied_heads(said):
    """The converters' rule on the whole config is what the decoder has, wherever it says so."""
    flat = [
        {"num_experts_per_tok": 2} | family_cases.config_of(c) | {"model_type": c.family} for c in family_cases.CASES
    ]
    for hf in (*flat, *map(multimodal.config_of, (*multimodal.CASES, *multimodal.CARRIED))):
        for part in (None, *({"text_config"} & hf.keys())):
            whole = {k: v for k, v in hf.items() if k != config_json.TIED}
            keys = {} if said is None else {config_json.TIED: said}
            whole |= keys if part is None else {part: whole[part] | keys}
            assert models.config_from_hf(whole).tied == config_json.is_tied(whole)


def refusal(**hf):
    with pytest.raises(UnsupportedModelError) as caught:
        models.config_from_hf(hf)
    return str(caught.value)


@pytest.mark.parametrize(
    ("hf", "near"),
    [
        ({"model_type": "llama4_text"}, "llama"),
        ({"model_type": "qwen3_5"}, "qwen3"),
        ({"model_type": "deepseek_v32"}, "deepseek_v3"),
        ({"model_type": "kimi_k3", "architectures": ["DeepseekV3ForCausalLM"]}, "deepseek_v3"),
        ({"model_type": "mine", "architectures": ["LlamaForCausalLM"]}, "llama"),
        ({"model_type": "mine", "text_config": {"model_type": "qwen2"}, "vision_config": {}}, "qwen2"),
        ({"model_type": "starcoder3"}, "starcoder2"),
    ],
)
def test_an_unknown_decoder_is_told_its_nearest_relative(hf, near):
    text = refusal(**hf)
    assert text.startswith(f"model_type {hf['model_type']!r} is not supported")
    assert f"nearest supported relative is {near!r}" in text
    assert "docs/extending/family.md" in text
    assert ("looks at images" in text) == ("vision_config" in hf)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("t5", "an encoder with a decoder"),
        ("whisper", "an encoder with a decoder"),
        ("mamba2", "a state space or recurrent model"),
        ("rwkv", "a state space or recurrent model"),
        ("bert", "an encoder, which does not generate"),
        ("xlm-roberta", "an encoder, which does not generate"),
    ],
)
def test_what_is_no_decoder_is_told_so(kind, why):
    text = refusal(model_type=kind)
    assert f"model_type {kind!r} is not supported: it is {why}" in text
    assert "awq_jax.quantize" in text
    assert "relative" not in text


def test_a_config_may_say_that_it_is_no_decoder():
    assert "an encoder with a decoder" in refusal(model_type="mine", is_encoder_decoder=True)


@pytest.mark.parametrize("kind", [None, 7, "", "x" * 10000])
def test_a_type_that_is_no_name(kind):
    text = refusal(model_type=kind)
    what = "has no model_type: " if kind is None else "is not supported; its nearest supported relative is"
    assert what in text
    assert len(text) < 2500
