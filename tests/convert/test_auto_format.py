"""What ``auto`` takes: of the formats that hold the weights, the one that most engines read."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from awq_files import NAME, make, write

from awq_jax.convert import registry, writing
from awq_jax.convert.arrays import codes, linear
from awq_jax.errors import FormatError
from awq_jax.qtensor import QuantizedTensor

BLOOM = {"model_type": "bloom"}
DOWN = "transformer.h.0.mlp.dense_4h_to_h"


def test_auto_avoids_files_that_one_of_two_engines_reads(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """vLLM stops at AutoAWQ's scaled activations, and transformers wants them: no gemm file is read by both."""
    weights = {f"{DOWN}.weight": make(64, 8, 64)}
    assert writing.first_that_holds(lambda: weights.items(), BLOOM)[0] == "compressed-tensors"
    assert writing.first_that_holds(lambda: weights.items(), {"model_type": "llama"})[0] == "gemm"
    scaled = {n: dataclasses.replace(q, inv_scale=np.full(64, 0.5, np.float32)) for n, q in weights.items()}
    assert writing.first_that_holds(lambda: scaled.items(), {"model_type": "llama"})[0] == "awq-jax"
    with caplog.at_level(logging.WARNING):
        write(tmp_path / "a", weights, "gemm", {"model_type": "llama"})
        assert caplog.messages == []
        write(tmp_path / "b", weights, "gemm", BLOOM)
    (said,) = caplog.messages
    assert "bloom in gemm: vLLM stops at scaled activations" in said


def test_auto_holds_a_packed_head_and_padded_rows() -> None:
    head = {f"{NAME}.weight": make(64, 8, 64), "lm_head.weight": make(64, 8, 64)}
    padded = linear.build(np.zeros((24, 8), np.uint32), np.ones((3, 8), np.float32), None, 4, 64, 160, 8, "float32")
    for weights in (head, {f"{NAME}.weight": padded}):
        format, why = writing.first_that_holds(lambda weights=weights: weights.items(), {"model_type": "llama"})
        assert format == "compressed-tensors"
        assert "gemm would hold it as float" in why or "(padded)" in why


@pytest.mark.parametrize(
    ("k", "group", "bits", "stored"), [(144, 64, 4, 16), (80, 32, 3, 16), (48, 128, 8, 48), (100, 128, 4, 100)]
)
def test_padded_rows_are_held_in_smaller_groups(tmp_path: Path, k: int, group: int, bits: int, stored: int) -> None:
    rng = np.random.default_rng(0)
    groups = -(-k // group)
    rows = rng.integers(0, 2**bits, (groups * group, 8)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.1, (groups, 8)).astype(np.float32)
    zeros = rng.integers(0, 2**bits, (groups, 8)).astype(np.uint8)
    q = linear.build(codes.pack(rows, bits), scales, zeros, bits, group, k, 8, "float32")
    which = np.arange(k) // group
    want = (rows[:k].astype(np.float64) - zeros[which]) * scales[which]  # by hand
    records = writing.write_checkpoint(tmp_path / "out", {f"{NAME}.weight": q}.items(), {}, "compressed-tensors")
    assert records[0].deviation == 0
    read = registry.open_source(tmp_path / "out").read(f"{NAME}.weight")
    assert isinstance(read, QuantizedTensor)
    assert read.group_size == stored
    np.testing.assert_allclose(codes.dequantize(read, np.float64), want, rtol=1e-12)


def test_padded_rows_without_a_common_group_are_refused(tmp_path: Path) -> None:
    q = linear.build(np.zeros((16, 8), np.uint32), np.ones((2, 8), np.float32), None, 4, 64, 100, 8, "float32")
    with pytest.raises(FormatError, match=r"group size 64 does not divide its 100 inputs \(padded\)"):
        writing.write_checkpoint(tmp_path / "out", {f"{NAME}.weight": q}.items(), {}, "compressed-tensors")


@pytest.mark.parametrize("head", ["lm_head", "embed_out"])
def test_a_packed_head_is_no_exception(tmp_path: Path, head: str) -> None:
    """Read so by vLLM since 0.18 and by transformers; an embedding, which is looked up, becomes float."""
    weights = {n: make(64, 8, 16) for n in (f"{head}.weight", "model.embed_tokens.weight", f"{NAME}.weight")}
    dst = write(tmp_path / "out", weights, "compressed-tensors")
    assert json.loads((dst / "config.json").read_text())["quantization_config"]["ignore"] == []
    source = registry.open_source(dst)
    assert {n for n in source.names() if source.info(n).packed} == {f"{head}.weight", f"{NAME}.weight"}
    for name, q in weights.items():
        read = source.read(name)
        dense = codes.dequantize(read).T if isinstance(read, QuantizedTensor) else read
        np.testing.assert_array_equal(dense, codes.dequantize(q).T)
