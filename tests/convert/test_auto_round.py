"""AutoRound's files, and quantization_config in the part of a config that is the decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from awq_jax.convert import conversion, registry, writing
from awq_jax.convert.arrays import codes, linear
from awq_jax.convert.source import SliceReader
from awq_jax.errors import CheckpointError, FormatError
from awq_jax.qtensor import QuantizedTensor

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8}
K, N, GROUP = 64, 32, 16
NAMES = [f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 1) for m in ("up", "down")]


def weight(bits: int, symmetric: bool, group: int = GROUP, seed: int = 0) -> QuantizedTensor:
    """As AutoRound makes them: a symmetric group has the code 0 (-2**(bits-1)), and half of the scales are negative."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.001, 0.1, (K // group, N)).astype(np.float16)
    q = rng.integers(0, 2**bits, (K // group, group, N)).astype(np.uint8)
    zeros = None if symmetric else rng.integers(1, 2**bits, scales.shape).astype(np.uint8)
    if symmetric:
        scales *= rng.choice([-1, 1], scales.shape).astype(np.float16)
        q[:, 0] = 0
    return linear.build(codes.pack(q.reshape(K, N), bits), scales, zeros, bits, group, K, N, "float32")


def checkpoint(path: Path, layout: str, weights: dict[str, QuantizedTensor], quant: dict[str, Any]) -> Path:
    """Tensors of a layout, without ``g_idx`` as AutoRound leaves them, under its own settings."""
    writing.write_checkpoint(path, list(weights.items()), CONFIG, layout)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "auto-round", "data_type": "int", "group_size": GROUP} | quant
    (path / "config.json").write_text(json.dumps(config))
    return path


PACKINGS = [
    ("auto_round:auto_gptq", "gptq", True),
    ("auto_round:auto_gptq:exllamav2", "gptq", True),
    (None, "gptq", True),
    ("auto_round", "gptq-v2", False),
    ("auto_round:gptqmodel", "gptq-v2", False),
    ("auto_round:exllamav2", "gptq-v2", False),
    ("auto_round:auto_gptq", "gptq", False),
    ("auto_round:auto_awq", "gemm", True),
    ("auto_round:auto_awq", "gemm", False),
]


@pytest.mark.parametrize(("packing", "layout", "symmetric"), PACKINGS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_read_exactly(tmp_path: Path, packing: str | None, layout: str, symmetric: bool, bits: int) -> None:
    if layout == "gemm" and bits != 4:
        pytest.skip("AWQ has 4 bits")
    q = weight(bits, symmetric)
    quant = {"bits": bits, "sym": symmetric} | ({} if packing is None else {"packing_format": packing})
    path = checkpoint(tmp_path / "a", layout, {NAMES[0]: q}, quant)
    source = registry.open_source(path)
    assert source.format == layout
    got, want = source.read(NAMES[0]), codes.dequantize(q, np.float64).T
    assert isinstance(got, QuantizedTensor)
    assert got.symmetric == symmetric
    assert not symmetric or (np.asarray(got.scales) < 0).any()
    np.testing.assert_array_equal(codes.dequantize(got, np.float64).T, want)
    part = SliceReader(source).read(NAMES[0], (slice(0, N), slice(32, K)))
    np.testing.assert_array_equal(codes.dequantize(part, np.float64).T, want[:, 32:])
    for to in ("float", "compressed-tensors", "awq-jax"):
        conversion.checkpoint(path, tmp_path / to, to)
        again = registry.open_source(tmp_path / to).read(NAMES[0])
        again = codes.dequantize(again, np.float64).T if isinstance(again, QuantizedTensor) else again
        np.testing.assert_array_equal(again, want)
        written = json.loads((tmp_path / to / "config.json").read_text()).get("quantization_config", {})
        assert written.get("quant_method") != "auto-round"


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_widths_that_gptq_has_not(tmp_path: Path, bits: int) -> None:
    q = weight(bits, symmetric=False)
    path = checkpoint(tmp_path / "a", "compressed-tensors", {NAMES[0]: q}, {"bits": bits, "sym": False})
    tensors = {
        "qweight": np.asarray(q.qweight).view(np.int32),
        "qzeros": np.ascontiguousarray(codes.pack(np.ascontiguousarray(np.asarray(q.zeros).T), bits).T).view(np.int32),
        "scales": np.asarray(q.scales),
    }
    module = NAMES[0].removesuffix(".weight")
    save_file({f"{module}.{p}": a for p, a in tensors.items()}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["packing_format"] = "auto_round"
    (path / "config.json").write_text(json.dumps(config))
    got = registry.open_source(path).read(NAMES[0])
    np.testing.assert_array_equal(codes.dequantize(got, np.float64), codes.dequantize(q, np.float64))


def test_settings_of_modules(tmp_path: Path) -> None:
    """By name, before any pattern; 16 bits are float."""
    weights = {
        NAMES[0]: weight(4, True),
        NAMES[1]: weight(8, True, 32),
        NAMES[2]: weight(4, False),
        NAMES[3]: weight(8, True),
    }
    tensors: dict[str, np.ndarray] = {}
    for name, q in weights.items():
        layout = checkpoint(tmp_path / name, "gptq", {name: q}, {})
        tensors |= load_file(layout / "model.safetensors")
    extra = {
        r"layers.\d+.mlp.down_proj": {"bits": 8},
        NAMES[1].removesuffix(".weight"): {"bits": 8, "group_size": 32},
        NAMES[2].removesuffix(".weight"): {"sym": False},
        "lm_head": {"bits": 16, "data_type": "float"},
    }
    quant = {"bits": 4, "sym": True, "extra_config": extra, "packing_format": "auto_round:auto_gptq"}
    path = checkpoint(tmp_path / "all", "gptq", {NAMES[0]: weights[NAMES[0]]}, quant)
    save_file(tensors, path / "model.safetensors")
    source = registry.open_source(path)
    for name, q in weights.items():
        np.testing.assert_array_equal(codes.dequantize(source.read(name)), codes.dequantize(q))


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ({"packing_format": "auto_round:fp8_static"}, "packing_format 'auto_round:fp8_static'"),
        ({"packing_format": "mlx"}, "packing_format 'mlx'"),
        ({"data_type": "mx_fp"}, "data_type 'mx_fp'"),
        ({"act_bits": 8}, "act_bits 8"),
        ({"rotation_config": {"a": 1}}, "rotation_config"),
        ({"bits": 9}, "bits must be"),
    ],
)
def test_what_is_refused(tmp_path: Path, quant: dict[str, Any], message: str) -> None:
    path = checkpoint(tmp_path / "a", "gptq", {NAMES[0]: weight(4, True)}, {"bits": 4, "sym": True} | quant)
    with pytest.raises((FormatError, CheckpointError), match=message):
        registry.open_source(path)


@pytest.mark.parametrize("layout", ["gptq", "gemm", "compressed-tensors", "mlx", "awq-jax"])
@pytest.mark.parametrize(
    "part", ["text_config", "llm_config", "language_config", "thinker_config", "thinker_config.text_config"]
)
def test_nested_settings_are_found_and_not_left_stale(tmp_path: Path, layout: str, part: str) -> None:
    q = weight(4, True, 32)
    writing.write_checkpoint(tmp_path / "a", [(NAMES[0], q)], CONFIG, layout)
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    moved = {k: config.pop(k) for k in ("quantization_config", "quantization") if k in config}
    inner = config
    for key in part.split("."):
        inner = inner.setdefault(key, {"hidden_size": 4})
    inner |= moved
    path.write_text(json.dumps(config))
    source = registry.open_source(tmp_path / "a")
    assert source.format == layout
    want = codes.dequantize(q)
    np.testing.assert_array_equal(codes.dequantize(source.read(NAMES[0])), want)
    for to in ("float", "compressed-tensors", "awq-jax"):
        conversion.checkpoint(tmp_path / "a", tmp_path / to, to)
        written = json.loads((tmp_path / to / "config.json").read_text())
        top = {k: written.pop(k) for k in ("quantization_config", "quantization") if k in written}
        assert set(top) == (set() if to == "float" else {"quantization_config"})
        assert "quantization" not in json.dumps(written)
        assert part.split(".")[0] in written
        got = registry.open_source(tmp_path / to).read(NAMES[0])
        got = codes.dequantize(got) if isinstance(got, QuantizedTensor) else got.T
        np.testing.assert_array_equal(got, want)


def test_settings_on_top_win_and_null_is_none(tmp_path: Path) -> None:
    q = weight(4, True, 32)
    writing.write_checkpoint(tmp_path / "a", [(NAMES[0], q)], CONFIG, "gemm")
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"text_config": {"quantization_config": {"quant_method": "fp8"}}}))
    np.testing.assert_array_equal(
        codes.dequantize(registry.open_source(tmp_path / "a").read(NAMES[0])), codes.dequantize(q)
    )
    writing.write_checkpoint(tmp_path / "b", [(NAMES[0], np.ones((4, 4), np.float32))], CONFIG, "float")
    path = tmp_path / "b" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": None}))
    assert registry.open_source(tmp_path / "b").format == "float"
