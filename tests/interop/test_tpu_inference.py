"""The plug-in in vLLM's JAX engine: its layers, models and compiled programs (`awq_jax.vllm`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import consumers
import numpy as np
import peers
import pytest
from vllm_families import log_softmax

pytestmark = pytest.mark.slow

ENVIRONMENT = "tpu-inference"
FORMS = [("gemm", False), ("gemm", True), ("compressed-tensors", False), ("compressed-tensors", True)]
FAMILIES = ("llama", "qwen3", "qwen2")


def test_layers_multiply_as_numpy_does(tmp_path: Path) -> None:
    peers.drive(ENVIRONMENT, "layers_tpu_inference.py", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["differences"]) == 11
    for name, difference in found["differences"].items():
        assert isinstance(difference, float), (name, difference)
        assert difference < 2e-6, name
    refusals = found["refusals"]
    assert refusals["skipped"] == "UnquantizedMergedLinearMethod"
    assert "not packed alike" in refusals["half of a joined linear"]
    assert "do not divide by 4 devices" in refusals["groups that do not divide"]
    assert "CheckpointError: l.down_proj" in refusals["shapes that do not fit"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """Models with heads of 64, which the engine does not pad, and their log-probabilities."""
    peers.environment(ENVIRONMENT)
    work, ours = tmp_path_factory.mktemp("tpu"), {}
    np.save(work / "ids.npy", consumers.IDS.astype(np.int32))
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512}.items():
            patch.setitem(consumers.SIZES, key, value)
        for family in FAMILIES:
            source = consumers.float_checkpoint(family, work / "float" / family)
            for symmetric in (False, True):
                model = consumers.quantized(source, symmetric)
                table = log_softmax(np.asarray(model(consumers.IDS[None]))[0])
                for format in dict.fromkeys(f for f, _ in FORMS):
                    name = f"{family}--{format}-{symmetric}"
                    model.save(work / name, format=format)
                    ours[name] = table
    return work, ours


@pytest.mark.parametrize("devices", [1, 2])
def test_models_are_ours(checkpoints: tuple[Path, dict[str, np.ndarray]], devices: int) -> None:
    work, ours = checkpoints
    out = work / f"out-{devices}"
    out.mkdir()
    names = [work / name for name in ours]
    peers.drive(ENVIRONMENT, "read_tpu_inference.py", "yes", devices, "float32", work / "ids.npy", out, *names)
    for name, table in ours.items():
        refusal = out / f"{name}.txt"
        assert not refusal.exists(), refusal.read_text()
        assert np.abs(np.load(out / f"{name}.npy")[:, : table.shape[1]] - table).max() < 1e-4, name
        facts = json.loads((out / f"{name}.json").read_text())
        assert "uint32" in facts["dtypes"]
        assert facts["linears_on_device"] <= 1.1 * facts["linears_in_files"]


def test_the_engine_refuses_them_without_the_plugin(checkpoints: tuple[Path, dict[str, np.ndarray]]) -> None:
    work, _ = checkpoints
    out = work / "out-none"
    out.mkdir()
    names = [f"qwen3--gemm-{False}", f"qwen3--compressed-tensors-{False}"]
    paths = [work / name for name in names]
    peers.drive(ENVIRONMENT, "read_tpu_inference.py", "no", 1, "float32", work / "ids.npy", out, *paths)
    awq, asymmetric = ((out / f"{name}.txt").read_text() for name in names)
    assert "quantization method not supported" in awq
    assert "is not yet supported in the JAX path" in asymmetric


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_weights_stay_packed_on_tpus(chip: str, tmp_path: Path) -> None:
    libtpu = peers.environment(ENVIRONMENT) / "libtpu"
    peers.drive(ENVIRONMENT, "compile_tpu_inference.py", libtpu, chip, tmp_path / "rows.json")
    rows: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())
    own = [row for row in rows if row["path"] == "awq_jax"]
    assert {(row["devices"], row["symmetric"]) for row in own} == {(n, s) for n in (1, 4, 8) for s in (False, True)}
    for row in own:
        assert row["kernels"] == 5, row
        assert row["arguments"] - row["activations"] <= 1.1 * row["file"], row
        assert row["temporary"] <= 0.1 * row["file"], row
