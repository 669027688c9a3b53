"""Tensors of which the decoder makes no parameter: carried through to the bit, recomputed, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import random_files
from random_files import config_of

import awq_jax
from awq_jax import convert, models
from awq_jax.errors import WeightError
from awq_jax.models.families import FAMILIES

TOKENS = np.random.default_rng(1).integers(3, 40, (4, 12)).astype(np.int32)
FAST: dict[str, Any] = {"group_size": 16, "method": "rtn", "progress": False}
# Families that publish layers which predict the tokens after the next, and what those are called.
AHEAD = {
    "deepseek_v3": ("model.layers.2.", "model.layers.3."),
    "kimi_k2": ("model.layers.2.", "model.layers.3."),
    "glm4_moe": ("model.layers.2.", "model.layers.3."),
    "glm4_moe_lite": ("model.layers.2.", "model.layers.3."),
    "ernie4_5_moe": ("model.mtp_block.0.", "model.mtp_linear_proj.0."),
    "minimax_m2": ("model.mtp_modules.0.", "model.layers.1.mtp."),
    "qwen3_next": ("mtp.layers.0.", "mtp."),
}


def ahead(name: str) -> dict[str, np.ndarray]:
    """In dtypes of their own."""
    rng = np.random.default_rng(2)
    first, second = AHEAD[name]
    made = {f"{first}mlp.experts.{e}.up_proj.weight": rng.normal(size=(16, 32)).astype(np.float16) for e in range(2)}
    made |= {f"{first}eh_proj.weight": rng.normal(size=(32, 64)).astype(ml_dtypes.bfloat16)}
    made |= {f"{first}embed_tokens.weight": rng.normal(size=(64, 32)).astype(np.float32)}
    return made | {f"{second}enorm.weight": rng.normal(size=32).astype(np.float32)}


@pytest.mark.parametrize("name", AHEAD)
def test_layers_that_predict_ahead_are_carried_through(name: str, tmp_path: Path) -> None:
    hf = config_of(name) | {"num_nextn_predict_layers": 2}
    stored = random_files.write(tmp_path / "model", hf, extra=ahead(name))
    awq_jax.load(tmp_path / "model").save(tmp_path / "saved")
    convert.checkpoint(tmp_path / "model", tmp_path / "converted", "float", workers=1)
    for directory in ("saved", "converted"):
        config, tensors = random_files.read(tmp_path / directory)
        assert config["num_nextn_predict_layers"] == 2
        assert {n: a.tobytes() for n, a in tensors.items()} == {n: a.tobytes() for n, a in stored.items()}


def test_by_a_streamed_quantization_and_conversions_too(tmp_path: Path) -> None:
    """They stay float, and each format's config says so by name."""
    hf = config_of("glm4_moe") | {"num_nextn_predict_layers": 2, "intermediate_size": 64, "moe_intermediate_size": 32}
    random_files.write(tmp_path / "model", hf, extra=ahead("glm4_moe"))
    settings = FAST | {"group_size": 32, "format": "gemm"}
    awq_jax.quantize_checkpoint(tmp_path / "model", tmp_path / "gemm", TOKENS, **settings)
    for format in ("compressed-tensors", "awq-jax"):
        convert.checkpoint(tmp_path / "gemm", tmp_path / format, format, allow_lossy=True, workers=1)
    for format, key in (("gemm", "modules_to_not_convert"), ("compressed-tensors", "ignore"), ("awq-jax", "")):
        config, tensors = random_files.read(tmp_path / format)
        assert config["num_nextn_predict_layers"] == 2
        for name, value in ahead("glm4_moe").items():
            assert tensors[name].tobytes() == value.tobytes()
        assert not key or "model.layers.2.eh_proj" in config["quantization_config"][key]
    awq_jax.load(tmp_path / "gemm").save(tmp_path / "again", "gemm")
    before, after = (random_files.read(tmp_path / d)[1] for d in ("gemm", "again"))
    assert {n: a.tobytes() for n, a in before.items()} == {n: a.tobytes() for n, a in after.items()}


def test_every_rule_carries() -> None:
    """No family has a way to drop a tensor."""
    assert not hasattr(models.config_from_hf(config_of("llama")).names, "ignored")
    assert set(AHEAD) <= set(FAMILIES)


def test_a_vector_that_is_called_like_a_mask_is_refused(tmp_path: Path) -> None:
    hf = config_of("gpt2")
    mask = {"transformer.h.0.attn.bias": np.tril(np.ones((1, 1, 8, 8), np.float32))}
    mask |= {"transformer.h.0.attn.masked_bias": np.asarray(-1e4, np.float32)}
    random_files.write(tmp_path, hf, extra=mask)
    awq_jax.load(tmp_path)
    random_files.write(tmp_path, hf, extra={"transformer.h.0.attn.bias": np.ones(32, np.float32)})
    with pytest.raises(WeightError, match=r"holds transformer\.h\.0\.attn\.bias, which a gpt2 model"):
        awq_jax.load(tmp_path)
