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
from awq_jax.errors import FormatError

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
