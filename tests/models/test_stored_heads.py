"""A head beside the embedding: what is stored counts, whatever the config says, in every family and in every path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import family_cases
import multimodal
import numpy as np
import pytest
import random_files
import tiny_checkpoints
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import awq_jax
from awq_jax import QuantizedTensor, convert, models, paths
from awq_jax.convert import head, registry
from awq_jax.convert.arrays import codes, linear

CASES = {c.name: family_cases.config_of(c) | {"model_type": c.family} for c in family_cases.CASES}
CASES |= {c.name: multimodal.config_of(c) for c in (*multimodal.CASES, *multimodal.CARRIED)}
# Every name that an embedding or a head has, and every way of nesting.
NAMES = ("llama", "gpt2", "gpt_neox", "falcon", "bloom", "opt-350m", "exaone", "internlm2", "mpt", "gemma3")
NAMES += ("llava", "llava_next", "qwen2_vl", "qwen3_vl", "phi3_v", "qwen2_5_omni")
TOKENS = np.random.default_rng(1).integers(3, 40, (4, 12)).astype(np.int32)
FAST: dict[str, Any] = {"group_size": 16, "method": "rtn", "progress": False}


def tied(hf: dict[str, Any], value: bool) -> dict[str, Any]:
    """The config with the flag everywhere."""
    inner = {k: tied(hf[k], value) for k in ("thinker_config", "text_config") if isinstance(hf.get(k), dict)}
    return hf | {"tie_word_embeddings": value} | inner


@pytest.mark.parametrize("name", NAMES)
def test_in_every_family_a_head_that_differs_is_kept_and_a_copy_is_stored_once(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = random_files.write(tmp_path / "own", tied(CASES[name], False))
    random_files.save(tmp_path / "own", tied(CASES[name], True), tensors)
    heads = [n for n in tensors if head.HEAD.search(n)]
    embedding = head.embedding_of(heads[0], tensors)
    assert len(heads) == 1
    assert embedding is not None
    model = awq_jax.load(tmp_path / "own")
    assert "it is kept" in caplog.text
    assert not model.config.tied
    kernel = paths.flatten(model.params)["lm_head/kernel"]
    np.testing.assert_array_equal(np.asarray(kernel).T, tensors[heads[0]])
    model.save(tmp_path / "saved")
    convert.checkpoint(tmp_path / "own", tmp_path / "converted", "float", workers=1)
    for directory in ("saved", "converted"):
        config, written = random_files.read(tmp_path / directory)
        np.testing.assert_array_equal(written[heads[0]], tensors[heads[0]])
        assert models.config_of(registry.open_source(tmp_path / directory)).tied is False
        assert config == config | {k: v for k, v in tied(CASES[name], False).items() if k == "tie_word_embeddings"} or (
            config["thinker_config"]["tie_word_embeddings"] is False
        )

    caplog.clear()
    random_files.save(tmp_path / "copy", tied(CASES[name], True), tensors | {heads[0]: tensors[embedding]})
    model = awq_jax.load(tmp_path / "copy")
    assert model.config.tied
    assert not caplog.text
    model.save(tmp_path / "once")
    convert.checkpoint(tmp_path / "copy", tmp_path / "once-converted", "float", workers=1)
    for directory in ("once", "once-converted"):
        assert set(random_files.read(tmp_path / directory)[1]) == set(tensors) - set(heads)


@pytest.mark.parametrize(
    ("top", "part", "stored", "want"),
    [
        (True, None, False, True),
        (None, True, False, True),
        (False, True, False, True),  # there is no other head
        (False, True, True, False),  # the whole counts before its part
        (True, False, True, True),
        (None, None, True, False),
    ],
)
def test_whole_and_part(top: bool | None, part: bool | None, stored: bool, want: bool, tmp_path: Path) -> None:
    """Of a model that looks at images; ``stored``: a copy of the embedding."""
    hf = CASES["qwen2_vl"]
    tensors = random_files.write(tmp_path, tied(hf, not stored))
    if stored:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    text = {k: v for k, v in hf["text_config"].items() if k != "tie_word_embeddings"}
    whole = {k: v for k, v in hf.items() if k != "tie_word_embeddings"} | {
        "text_config": text | ({} if part is None else {"tie_word_embeddings": part})
    }
    random_files.save(tmp_path, whole | ({} if top is None else {"tie_word_embeddings": top}), tensors)
    model = awq_jax.load(tmp_path)
    assert model.config.tied is want
    assert ("lm_head/kernel" in paths.flatten(model.params)) is not want


def test_an_embedding_that_only_the_head_holds(tmp_path: Path) -> None:
    """As transformers 5 does: of two that are one, either may be stored."""
    tensors = random_files.write(tmp_path, tied(CASES["llama"], True))
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    random_files.save(tmp_path, tied(CASES["llama"], True), tensors)
    np.testing.assert_array_equal(
        paths.flatten(awq_jax.load(tmp_path).params)["embed_tokens/embedding"], tensors["lm_head.weight"]
    )


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_logits_are_those_of_transformers_also_after_a_streamed_quantization(name: str, tmp_path: Path) -> None:
    hf = tied(CASES[name], False)
    random_files.write(tmp_path / "model", hf)
    said = {"tie_word_embeddings": True} if name == "llama" else {"text_config": hf["text_config"]}
    if name != "llama":
        said["text_config"]["tie_word_embeddings"] = True
    random_files.save(tmp_path / "model", hf | said, random_files.read(tmp_path / "model")[1])
    auto = AutoModelForCausalLM if name == "llama" else AutoModelForImageTextToText
    theirs = auto.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        want = theirs(torch.tensor(TOKENS[:1].astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(awq_jax.load(tmp_path / "model")(TOKENS[:1]), want, atol=1e-4)
    awq_jax.quantize_checkpoint(tmp_path / "model", tmp_path / "out", TOKENS, format="awq-jax", **FAST)
    config, tensors = random_files.read(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert config.get("text_config", config)["tie_word_embeddings"] is False  # and no part contradicts the whole
    assert "lm_head.weight" in tensors


def packed(n: int, k: int, seed: int) -> QuantizedTensor:
    """Symmetric, in one group."""
    rng = np.random.default_rng(seed)
    words = codes.pack(rng.integers(0, 16, (k, n)).astype(np.uint8), 4)
    return linear.build(words, rng.uniform(0.01, 0.02, (1, n)).astype(np.float16), None, 4, k, k, n, "float32")


@pytest.mark.parametrize(
    "format", ["gemm", "gemv", "marlin", "gptq", "gptq-v2", "compressed-tensors", "mlx", "awq-jax"]
)
def test_a_packed_head_is_kept_in_every_format(format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf = tied(CASES["llama"], False) | {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 384}
    hf["num_key_value_heads"] = 4
    tensors: dict[str, Any] = random_files.write(tmp_path / "model", hf)
    for i, name in enumerate(sorted(tensors)):
        if name.endswith("_proj.weight") or name == "lm_head.weight":
            tensors[name] = packed(*tensors[name].shape, i)
    want = codes.dequantize(tensors["lm_head.weight"]).T
    convert.write_checkpoint(tmp_path / "packed", tensors.items(), hf, format, allow_lossy=True)
    tiny_checkpoints.tokenizer().save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    registry.open_source(tmp_path / "packed")
    assert "it is kept" in caplog.text
    for to in ("awq-jax", "mlx", "compressed-tensors", "gptq", "gguf-q4_0"):
        out = tmp_path / (f"{to}.gguf" if to == "gguf-q4_0" else to)
        convert.checkpoint(tmp_path / "packed", out, to, allow_lossy=True, workers=1)
        made = registry.open_source(out, packed=True)
        got = made.read("lm_head.weight")
        dense = codes.dequantize(got).T if isinstance(got, QuantizedTensor) else got
        np.testing.assert_allclose(np.asarray(dense, np.float32), want, atol=1e-4)
        assert made.config["tie_word_embeddings"] is False


def test_a_copy_with_a_bias_of_its_own_is_a_head(tmp_path: Path) -> None:
    hf = tied(CASES["phi"], True)
    tensors = random_files.write(tmp_path, tied(hf, False))
    random_files.save(tmp_path, hf, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    params = paths.flatten(awq_jax.load(tmp_path).params)
    np.testing.assert_array_equal(np.asarray(params["lm_head/bias"]), tensors["lm_head.bias"])
