"""Symmetric means a zero point of 2**(bits-1): files whose zero points say otherwise, in every layout that has some."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from awq_jax.convert import conversion, registry, writing
from awq_jax.convert.arrays import codes, linear
from awq_jax.convert.source import SliceReader
from awq_jax.errors import FormatError
from awq_jax.qtensor import QuantizedTensor

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8}
K, N, GROUP = 256, 64, 64
PART = "model.layers.0.mlp.up_proj"
NAME = f"{PART}.weight"
GPTQ = [(f, b) for f in ("gptq", "gptq-v2") for b in (2, 3, 4, 8)]


def weight(bits: int = 4, symmetric: bool = True, negative: bool = True) -> QuantizedTensor:
    rng = np.random.default_rng(bits)
    scales = rng.uniform(0.001, 0.1, (K // GROUP, N)).astype(np.float16)
    if negative:
        scales *= rng.choice([-1, 1], scales.shape).astype(np.float16)
    zeros = None if symmetric else rng.integers(1, 2**bits, scales.shape).astype(np.uint8)
    packed = codes.pack(rng.integers(0, 2**bits, (K, N)).astype(np.uint8), bits)
    return linear.build(packed, scales, zeros, bits, GROUP, K, N, "float32")


def saved(path: Path, format: str, *weights: QuantizedTensor) -> Path:
    names = [NAME, "model.layers.0.mlp.down_proj.weight"]
    writing.write_checkpoint(path, list(zip(names, weights, strict=False)), CONFIG, format)
    return path


def edit(path: Path, part: str, change: Callable[[np.ndarray], np.ndarray], **quant: Any) -> Path:
    """``change`` to a tensor of `NAME`, ``quant`` to the quantization_config."""
    tensors = load_file(path / "model.safetensors")
    if f"{PART}.{part}" in tensors:
        tensors[f"{PART}.{part}"] = np.ascontiguousarray(change(tensors[f"{PART}.{part}"]))
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        k: v for k, v in (config["quantization_config"] | quant).items() if v != "left out"
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def plus(step: int, bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """``step`` added to each field of ``bits`` of an array ``[M, W]`` of words, one at a time."""

    def change(words: np.ndarray) -> np.ndarray:
        out = np.empty(words.shape, np.uint32)
        for i, row in enumerate(words.view(np.uint32)):
            whole = sum(int(w) << (32 * j) for j, w in enumerate(row))
            fields = [(whole >> at) % 2**bits for at in range(0, 32 * len(row), bits)]
            whole = sum(((f + step) % 2**bits) << (bits * j) for j, f in enumerate(fields))
            out[i] = [(whole >> (32 * j)) % 2**32 for j in range(len(row))]
        return out.view(words.dtype)

    return change


def everywhere(path: Path) -> np.ndarray:
    """The weight ``[N, K]``: read whole, in slices, and by a conversion, which must agree."""
    source = registry.open_source(path)
    whole = codes.dequantize(source.read(NAME), np.float64).T
    for n in (slice(0, N // 2), slice(N // 2, N)):
        for k in (slice(0, K // 2), slice(K // 2, K)):
            part = SliceReader(registry.open_source(path)).read(NAME, (n, k))
            np.testing.assert_array_equal(codes.dequantize(part, np.float64).T, whole[n, k])
    conversion.checkpoint(path, path / "float", "float")
    np.testing.assert_array_equal(load_file(path / "float/model.safetensors")[NAME], whole)
    return whole


def refused(path: Path, what: str) -> None:
    """Whole, for any slice, and by a conversion, which leaves nothing."""
    with pytest.raises(FormatError, match=what):
        registry.open_source(path).read(NAME)
    for part in ((slice(0, N), slice(0, GROUP)), (slice(N // 2, N), slice(0, K)), (slice(0, N // 2), slice(0, K))):
        with pytest.raises(FormatError, match=what):
            SliceReader(registry.open_source(path)).read(NAME, part)
    with pytest.raises(FormatError, match=what):
        conversion.checkpoint(path, path / "out", "awq-jax")
    assert not (path / "out").exists()


@pytest.mark.parametrize(("format", "bits"), GPTQ)
@pytest.mark.parametrize("writer", ["gptqmodel:5.0", "auto_gptq"])
def test_gptq_of_the_other_version(tmp_path: Path, caplog: Any, format: str, bits: int, writer: str) -> None:
    """The version that makes it symmetric is taken, with one line that says so."""
    q = weight(bits)
    path = saved(tmp_path / "a", format, q, weight(bits))
    want = codes.dequantize(q, np.float64).T
    np.testing.assert_array_equal(everywhere(path), want)
    assert not caplog.records
    wrong = edit(saved(tmp_path / "b", format, q, weight(bits)), "", lambda a: a, meta={"quantizer": [writer]})
    label = "gptq" if format == "gptq-v2" else "gptq_v2"
    edit(wrong, "", lambda a: a, checkpoint_format=label, format=label)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(everywhere(wrong), want)
    said = [r.getMessage() for r in caplog.records if "zero points are those of" in r.getMessage()]
    assert len(said) == 6, said  # once for each of the six times that it was opened
    assert registry.open_source(wrong).read(NAME).symmetric


@pytest.mark.parametrize(("format", "bits"), GPTQ)
def test_gptq_of_no_version(tmp_path: Path, format: str, bits: int) -> None:
    step = 1 if format == "gptq-v2" else 2  # 2**(bits-1) + 1 as v2, + 2 as v1: what a third save leaves
    path = edit(saved(tmp_path / "a", format, weight(bits)), "qzeros", plus(step, bits))
    refused(path, rf"up_proj\.qzeros holds .* not {2 ** (bits - 1)}.*sym true")

    def one(words: np.ndarray) -> np.ndarray:
        words = words.copy()
        words[-1, -1] ^= 1 << 30  # in the last group of the last outputs alone
        return words

    refused(edit(saved(tmp_path / "b", format, weight(bits)), "qzeros", one), r"up_proj\.qzeros holds .*\(1 of 256")


@pytest.mark.parametrize("sym", [False, "left out"])
def test_gptq_that_is_not_said_to_be_symmetric(tmp_path: Path, sym: Any) -> None:
    """Zero points count as they are stored, unless they are one and the same middle, and nothing is said."""
    q = weight(4, symmetric=False)
    path = edit(saved(tmp_path / "a", "gptq", q), "", lambda a: a, sym=sym)
    np.testing.assert_array_equal(everywhere(path), codes.dequantize(q, np.float64).T)
    q = weight(4)
    path = edit(saved(tmp_path / "b", "gptq", q), "qzeros", plus(1, 4), sym=sym)
    moved = codes.dequantize(q, np.float64).T - (
        0 if sym else np.repeat(np.asarray(q.scales).T.astype(float), GROUP, 1)
    )
    np.testing.assert_allclose(everywhere(path), moved, rtol=0, atol=1e-12)


def test_gptq_asymmetric_beside_symmetric(tmp_path: Path) -> None:
    """What is asymmetric is numbered as what is symmetric shows; and refused where that is both ways."""
    q, other = weight(4, symmetric=False), weight(4)
    dynamic = {r"+:.*up_proj": {"sym": False}}
    path = saved(tmp_path / "a", "gptq-v2", q, other)
    edit(path, "", lambda a: a, sym=True, dynamic=dynamic, checkpoint_format="gptq", format="gptq")
    np.testing.assert_array_equal(everywhere(path), codes.dequantize(q, np.float64).T)
    third = "model.layers.1.mlp.up_proj.weight"
    tensors = {NAME: q, "model.layers.0.mlp.down_proj.weight": other, third: other}
    writing.write_checkpoint(tmp_path / "b", list(tensors.items()), CONFIG, "gptq-v2")
    edit(tmp_path / "b", "", lambda a: a, sym=True, dynamic={r"+:.*0\.mlp\.up_proj": {"sym": False}})
    stored = load_file(tmp_path / "b/model.safetensors")
    stored["model.layers.1.mlp.up_proj.qzeros"] -= 0x11111111
    save_file(stored, tmp_path / "b/model.safetensors")
    refused(tmp_path / "b", r"0\.mlp\.up_proj\.qzeros may be stored as gptq or gptq_v2")
    for name in (third, "model.layers.0.mlp.down_proj.weight"):  # of these, the zero points tell
        got = registry.open_source(tmp_path / "b").read(name)
        np.testing.assert_array_equal(codes.dequantize(got), codes.dequantize(other))


@pytest.mark.parametrize("format", ["gemm", "gemv"])
@pytest.mark.parametrize("key", ["zero_point", "sym"])
def test_awq(tmp_path: Path, format: str, key: str) -> None:
    said = {"zero_point": False} if key == "zero_point" else {"zero_point": "left out", "sym": True}
    q = weight()
    path = edit(saved(tmp_path / "a", format, q), "", lambda a: a, **said)
    np.testing.assert_array_equal(everywhere(path), codes.dequantize(q, np.float64).T)
    assert registry.open_source(path).read(NAME).symmetric
    for i, step in enumerate((-1, 1, 8)):
        refused(edit(saved(tmp_path / f"b{i}", format, q), "qzeros", plus(step, 4), **said), r"up_proj\.qzeros holds")
    meant = edit(saved(tmp_path / "c", format, q), "qzeros", plus(-1, 4), zero_point=True)
    step = np.repeat(np.asarray(q.scales).T.astype(float), GROUP, 1)
    np.testing.assert_allclose(everywhere(meant), codes.dequantize(q, np.float64).T + step, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("format", "part"), [("gemv_fast", "qzeros"), ("llm-awq", "scaled_zeros")])
def test_awq_with_offsets(tmp_path: Path, format: str, part: str) -> None:
    q = weight()
    path = edit(saved(tmp_path / "a", format, q), "", lambda a: a, zero_point=False)
    np.testing.assert_array_equal(everywhere(path), codes.dequantize(q, np.float64).T)
    refused(edit(path, part, lambda a: (a * 0.875).astype(a.dtype)), rf"up_proj\.{part} holds the zero point 7 ")


def test_marlin(tmp_path: Path) -> None:
    """It has no zero points: what says otherwise, or brings some, is refused."""
    path = saved(tmp_path / "a", "marlin", weight())
    np.testing.assert_array_equal(everywhere(path), codes.dequantize(weight(), np.float64).T)
    with pytest.raises(FormatError, match="zero_point is true"):
        registry.open_source(edit(path, "", lambda a: a, zero_point=True))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("packed", [True, False])
def test_compressed_tensors(tmp_path: Path, bits: int, packed: bool) -> None:
    """Zero points beside ``symmetric: true``, packed or as the int8 of older versions."""
    q = weight(bits)
    path = saved(tmp_path / "a", "compressed-tensors", q)
    np.testing.assert_array_equal(everywhere(path), codes.dequantize(q, np.float64).T)

    def add(where: Path, zero: int) -> Path:
        tensors = load_file(where / "model.safetensors")
        zeros = np.full((N, K // GROUP), 2 ** (bits - 1))
        zeros[-1, -1] = zero
        stored = codes.pack(zeros.astype(np.uint8), bits).view(np.int32)
        stored = stored if packed else (zeros - 2 ** (bits - 1)).astype(np.int8)
        save_file({**tensors, f"{PART}.weight_zero_point": stored}, where / "model.safetensors")
        return where

    path = add(saved(tmp_path / "b", "compressed-tensors", q), 2 ** (bits - 1))
    np.testing.assert_array_equal(everywhere(path), codes.dequantize(q, np.float64).T)
    assert registry.open_source(path).read(NAME).symmetric
    bad = add(saved(tmp_path / "c", "compressed-tensors", q), 2 ** (bits - 1) - 1)
    refused(bad, rf"up_proj\.weight_zero_point holds the zero point {2 ** (bits - 1) - 1} \(1 of 256 .*symmetric true")
