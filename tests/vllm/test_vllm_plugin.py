"""The plug-in for vLLM's JAX engine, as far as it runs without it; with it: ``tests/interop/test_tpu_inference.py``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pkgutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from awq_jax import vllm
from awq_jax.convert import registry
from awq_jax.convert.arrays import codes, linear
from awq_jax.convert.format import Destination, Record
from awq_jax.errors import FormatError
from awq_jax.vllm.settings import Settings

NAME = "model.layers.0.mlp.up_proj.weight"


def test_nothing_is_imported_without_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    register = pkgutil.resolve_name(project["entry-points"]["vllm.general_plugins"]["awq_jax"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "awq_jax.vllm.plugin", raising=False)
    register()
    assert "awq_jax.vllm.plugin" not in sys.modules
    assert "tpu_inference" not in sys.modules


def test_another_release_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.0")
    vllm.register()
    assert "0.32.0" in caplog.text
    assert "leaves 0.99.0 as it is" in caplog.text
    assert "awq_jax.vllm.plugin" not in sys.modules


@pytest.mark.parametrize(
    ("format", "bits", "group", "symmetric"),
    [("gemm", 4, 32, False), ("gemm", 4, 64, True), ("compressed-tensors", 4, 32, False),
     ("compressed-tensors", 8, 64, True), ("compressed-tensors", 8, 32, False)],
)  # fmt: skip
def test_what_is_written_is_decoded(format: str, bits: int, group: int, symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    k, n = 64, 16
    held = rng.integers(0, 2**bits, (k, n)).astype(np.uint8)
    zeros = None if symmetric else rng.integers(0, 2**bits, (k // group, n)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.02, (k // group, n)).astype(np.float16)
    q = linear.build(codes.pack(held, bits), scales, zeros, bits, group, k, n, "float32")
    make = registry.get(format).encoder
    assert make is not None
    encoder = make(Destination(config={"model_type": "llama"}))
    arrays, _ = encoder.encode(NAME, q)
    quant: Any = encoder.config([Record(NAME, (n, k), "float16", bits, group, symmetric)])
    settings = Settings.of(quant["quantization_config"])
    assert settings is not None
    scheme = settings.of_layer(NAME.removesuffix(".weight"))
    assert scheme is not None
    assert (scheme.bits, scheme.symmetric) == (bits, symmetric)
    found = settings.decode(scheme, {name.rpartition(".")[2]: a for name, a in arrays.items()}, n, k)
    np.testing.assert_array_equal(codes.unpack(found.qweight, bits, k), held)
    np.testing.assert_array_equal(found.scales, scales)
    assert (found.zeros is None) == symmetric
    if zeros is not None:
        np.testing.assert_array_equal(found.zeros, zeros)


def test_joined_linears_are_packed_alike() -> None:
    quant = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    settings = Settings.of(quant | {"modules_to_not_convert": ["lm_head", "layers.1.mlp.up_proj"]})
    assert settings is not None
    assert settings.of_layer("model.layers.0.mlp.gate_up_proj") is not None
    assert settings.of_layer("model.layers.0.self_attn.qkv_proj") is not None
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj, which are not packed alike"):
        settings.of_layer("model.layers.1.mlp.gate_up_proj")


def test_the_rest_is_left_to_the_engine() -> None:
    assert Settings.of(None) is None
    assert Settings.of({"quant_method": "fp8"}) is None
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}}
    floats = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    assert Settings.of(floats) is None
    with pytest.raises(FormatError, match="convert --to gemm"):
        Settings.of({"quant_method": "awq", "version": "gemv", "bits": 4})
