"""What transformers saves of a packed model once it has run: float weights, or words of another shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from awq_jax.convert import conversion, registry
from awq_jax.convert.arrays import codes
from awq_jax.convert.source import SliceReader
from awq_jax.errors import CheckpointError, FormatError

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8}
NAME = "model.layers.0.mlp.up_proj"


def store(directory: Path, tensors: dict[str, np.ndarray], quant: dict[str, Any]) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quant}))
    return directory


ARGS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16, "dynamic": False}


def decompressed(directory: Path, status: str, dtype: Any, **changes: Any) -> tuple[Path, np.ndarray]:
    """What transformers saves of a checkpoint after a forward pass: the weight beside its scale and shape."""
    rng = np.random.default_rng(0)
    weight = (rng.integers(-8, 8, (32, 64)) * 0.25).astype(dtype)
    tensors = {
        f"{NAME}.weight": weight,
        f"{NAME}.weight_scale": np.full((32, 4), 0.25, np.float32),
        f"{NAME}.weight_zero_point": np.zeros((4, 4), np.int32),
        f"{NAME}.weight_shape": np.array([32, 64], np.int64),
        f"{NAME}.weight_g_idx": np.arange(64, dtype=np.int32) // 16,
        f"{NAME}.bias": np.ones(32, np.float32),
        "model.norm.weight": np.ones(4, np.float32),
    }
    quant = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": status}
    groups = {"group_0": {"targets": ["Linear"], "weights": ARGS}}
    return store(directory, tensors, quant | {"config_groups": groups, "ignore": ["lm_head"]} | changes), weight


@pytest.mark.parametrize("status", ["decompressed", "frozen", "compressed"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_decompressed_by_a_forward_pass(tmp_path: Path, status: str, dtype: Any) -> None:
    """Read as a float checkpoint, without what the weights were packed with."""
    path, weight = decompressed(tmp_path / "a", status, dtype)
    source = registry.open_source(path)
    assert source.format == "float"
    assert source.names() == [f"{NAME}.bias", f"{NAME}.weight", "model.norm.weight"]
    assert "quantization_config" not in source.config
    np.testing.assert_array_equal(np.asarray(source.read(f"{NAME}.weight")), weight)
    conversion.checkpoint(path, tmp_path / "out", "float")
    assert set(load_file(tmp_path / "out/model.safetensors")) == set(source.names())
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_decompressed_of_other_formats(tmp_path: Path) -> None:
    """Whatever the weights were: they are float now. What is not is refused."""
    path, weight = decompressed(tmp_path / "a", "decompressed", np.float32, format="naive-quantized")
    np.testing.assert_array_equal(np.asarray(registry.open_source(path).read(f"{NAME}.weight")), weight)
    path, _ = decompressed(tmp_path / "b", "decompressed", np.int8)
    with pytest.raises(FormatError, match=r"up_proj\.weight_\w+, though .* the weights are float"):
        registry.open_source(path)
    group = {"targets": ["Linear"], "weights": ARGS, "input_activations": {"num_bits": 8}}
    path, _ = decompressed(tmp_path / "c", "decompressed", np.float32, config_groups={"group_0": group})
    with pytest.raises(FormatError, match="quantizes activations"):
        registry.open_source(path)
    path, _ = decompressed(tmp_path / "d", "compressed", np.int8)
    with pytest.raises(FormatError, match="unpacked integers are not readable"):
        registry.open_source(path)


def cpu_words(q: np.ndarray) -> np.ndarray:
    """Codes ``[K, N]`` as GPTQModel's AVX-512 kernel has them, uint8 ``[N, K/2]``: one code at a time."""
    k, n = q.shape
    out = np.zeros(n * k // 2, np.uint8)
    for i in range(k):
        for j in range(n):
            at = (j // 32) * 16 * k + (i // 2) * 32 + (j % 16) * 2 + i % 2
            out[at] |= int(q[i, j]) << (4 if j % 32 >= 16 else 0)
    return out.reshape(n, k // 2)


def after_a_pass(directory: Path, method: str, parts: Any = None, **quant: Any) -> tuple[Path, np.ndarray]:
    """A linear of 64 inputs and 96 outputs, and the weight ``[N, K]``."""
    rng = np.random.default_rng(0)
    q, zeros = rng.integers(0, 16, (64, 96)), rng.integers(0, 16, (4, 96)).astype(np.uint8)
    if quant.get("sym") or quant.get("zero_point") is False:
        zeros[:] = 8
    scales = rng.uniform(0.01, 0.1, (4, 96)).astype(np.float32)
    tensors = {"qweight": cpu_words(q), "qzeros": zeros, "scales": scales}
    if method == "gptq":
        tensors["g_idx"] = np.repeat(np.arange(4, dtype=np.int32), 16)
    tensors = {f"{NAME}.{p}": a for p, a in (tensors | (parts or {})).items()}
    settings = {"quant_method": method, "bits": 4, "group_size": 16} | quant
    rows = np.repeat(np.arange(4), 16)
    weight = (q - zeros[rows].astype(np.float64)) * scales[rows].astype(np.float64)
    return store(directory, tensors, settings), weight.T


CPU_WORDS = [
    ("awq", {"version": "gemm", "zero_point": True}),
    ("awq", {"version": "gemm", "zero_point": False}),
    ("gptq", {"sym": False, "checkpoint_format": "gptq"}),
    ("gptq", {"sym": False, "checkpoint_format": "gptq_v2"}),
    ("gptq", {"sym": True, "checkpoint_format": "gptq"}),
]


@pytest.mark.parametrize(("method", "quant"), CPU_WORDS)
def test_words_of_the_avx512_kernel(tmp_path: Path, method: str, quant: dict[str, Any]) -> None:
    """What transformers 5.24 saves of a bfloat16 AWQ or GPTQ model that ran: read exactly, in slices too."""
    path, weight = after_a_pass(tmp_path / "a", method, **quant)
    source = registry.open_source(path)
    np.testing.assert_array_equal(codes.dequantize(source.read(f"{NAME}.weight"), np.float64).T, weight)
    for n, k in ((slice(0, 32), slice(0, 64)), (slice(0, 96), slice(16, 48))):
        part = SliceReader(source).read(f"{NAME}.weight", (n, k))
        np.testing.assert_array_equal(codes.dequantize(part, np.float64).T, weight[n, k])
    symmetric = quant.get("sym", not quant.get("zero_point"))
    assert registry.open_source(path).read(f"{NAME}.weight").symmetric == symmetric
    conversion.checkpoint(path, tmp_path / "out", "awq-jax")
    again = registry.open_source(tmp_path / "out").read(f"{NAME}.weight")
    np.testing.assert_array_equal(codes.dequantize(again, np.float64).T, weight)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_words_that_cannot_be_read_say_why(tmp_path: Path, method: str) -> None:
    path, _ = after_a_pass(tmp_path / "a", method, {"qzeros": np.zeros((4, 96), np.float32)}, sym=False)
    with pytest.raises(FormatError, match=r"up_proj was saved after a forward pass .*order of torch's int4 kernel"):
        registry.open_source(path)
    path, _ = after_a_pass(tmp_path / "b", method, {"scales": np.ones((3, 96), np.float32)}, sym=False)
    with pytest.raises(CheckpointError, match="do not fit each other"):
        registry.open_source(path)
    path, _ = after_a_pass(tmp_path / "c", method, sym=False, group_size=32)
    with pytest.raises(CheckpointError, match="up_proj has"):
        registry.open_source(path)
    if method == "gptq":
        order = np.arange(64, dtype=np.int32) % 4
        path, _ = after_a_pass(tmp_path / "d", method, {"g_idx": order}, sym=False)
        with pytest.raises(FormatError, match="act-order and was saved after a forward pass"):
            registry.open_source(path)
