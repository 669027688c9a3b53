"""How long a model's context is where its rope is stretched, and that nothing is cut without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_files
import torch
from transformers import AutoModelForCausalLM

import awq_jax
from awq_jax import evaluate, models
from awq_jax.serve.sampling import Sampling

LLAMA = random_files.config_of("llama") | {"max_position_embeddings": 64, "rope_theta": 1e4, "rope_parameters": None}
TOKENS = np.random.default_rng(0).integers(3, 60, (2, 240)).astype(np.int32)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}


def spelled(scaling: dict[str, Any], way: str) -> dict[str, Any]:
    """The scaling as transformers 5 writes it, or as it was before: with ``rope_type``, or ``type``."""
    if way == "rope_parameters":
        return {"rope_parameters": scaling | {"rope_theta": 1e4}}
    kind = scaling["rope_type"]
    return {"rope_scaling": {k: v for k, v in scaling.items() if k != "rope_type"} | {way: kind}}


@pytest.mark.parametrize("way", ["rope_parameters", "rope_type", "type"])
@pytest.mark.parametrize(
    ("kind", "more", "want"),
    [
        ("yarn", {}, 256),
        ("yarn", {"original_max_position_embeddings": 48}, 192),  # Qwen3: 40960, of which 32768 are stretched
        ("yarn", {"original_max_position_embeddings": 16}, 64),  # stretched already
        ("linear", {}, 256),
        ("dynamic", {}, 256),
        ("llama3", LLAMA3, 64),
        ("longrope", LONG, 64),
    ],
)
def test_lengths(way: str, kind: str, more: dict[str, Any], want: int) -> None:
    scaling = spelled({"rope_type": kind, "factor": 4.0, **more}, way)
    assert models.config_from_hf(LLAMA | scaling).max_length == want


@pytest.mark.parametrize("tower", [False, True])
def test_of_gemma_3_the_length_is_that_after_the_stretch(tower: bool) -> None:
    hf = random_files.config_of("gemma3")
    text = hf["text_config"] | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_parameters": None}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    found = models.config_from_hf(hf | {"text_config": text} if tower else text)
    assert max(layer.rope.factor for layer in found.layers if layer.rope) == 8
    assert found.max_length == 64


def test_a_decoder_behind_a_tower_is_stretched_too() -> None:
    hf = random_files.config_of("llava")
    text = hf["text_config"] | {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None}
    assert models.config_from_hf(hf | {"text_config": text}).max_length == 256


@pytest.mark.parametrize("way", ["rope_parameters", "type"])
@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_stretched_contexts_are_used_whole(
    kind: str, way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In generate, eval and both calibrations; logits at the far end are those of transformers."""
    random_files.write(tmp_path / "model", LLAMA | spelled({"rope_type": kind, "factor": 4.0}, way))
    model = awq_jax.load(tmp_path / "model")
    if way == "type":
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
        with torch.no_grad():
            want = theirs(torch.tensor(TOKENS[:1].astype(np.int64))).logits.numpy()
        np.testing.assert_allclose(model(TOKENS[:1]), want, atol=1e-4)
    [said] = model.generator.run(model.params, [TOKENS[0].tolist()], max_new_tokens=16, sampling=Sampling())
    assert len(said) == 16
    assert evaluate.perplexity(model, TOKENS[0], context=200).tokens == 239
    if way == "type":
        settings: dict[str, Any] = {"seq_len": 240, "group_size": 16, "method": "rtn", "progress": False}
        assert model.quantize(TOKENS, **settings).tokens == TOKENS.size
        done = awq_jax.quantize_checkpoint(tmp_path / "model", tmp_path / "out", TOKENS, **settings)
        assert done.report.tokens == TOKENS.size
    assert not caplog.text


def test_what_does_not_fit_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    random_files.write(tmp_path / "model", LLAMA)
    model = awq_jax.load(tmp_path / "model")
    prompt = TOKENS[0, :60].tolist()
    [said] = model.generator.run(model.params, [prompt], max_new_tokens=4, sampling=Sampling())
    assert len(said) == 4
    assert not caplog.text
    model.generator.run(model.params, [prompt], max_new_tokens=9, sampling=Sampling())
    assert "answer 0 ends after 4 tokens, not 9: the model's context of 64 is full" in caplog.text
    caplog.clear()
    model.generator.run(model.params, [prompt], max_new_tokens=9, sampling=Sampling(), eos=said[1:2])
    assert not caplog.text
    for quantize in (
        model.quantize,
        lambda *a, **k: awq_jax.quantize_checkpoint(*(tmp_path / "model", tmp_path / "o"), *a, **k),
    ):
        caplog.clear()
        quantize(TOKENS, seq_len=100, group_size=16, method="rtn", progress=False)
        assert "calibrating on sequences of 64 tokens, not 100" in caplog.text
