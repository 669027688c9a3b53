"""``method="rtn"`` needs no calibration: none is read, and the bytes are those of any."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints

import awq_jax
from awq_jax import data
from awq_jax.cli import entry
from awq_jax.data import sources

TOKENS = np.random.default_rng(1).integers(0, 256, (2, 16)).astype(np.int32)
RTN = {"group_size": 16, "method": "rtn", "progress": False}
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 4, "num_hidden_layers": 2}


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def checkpoint(request, tmp_path_factory) -> Path:
    """Without a tokenizer, which no text could do without."""
    directory = tmp_path_factory.mktemp("rtn") / "float"
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if request.param == "mixtral" else {}
    tiny_checkpoints.checkpoint(directory, request.param, seed=3, **SIZES, **experts)
    for path in directory.glob("tokenizer*"):
        path.unlink()
    return directory


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("calibration text was asked for")

    monkeypatch.setattr(sources, "default_documents", refuse)
    monkeypatch.setattr(sources, "stream", refuse)


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def test_every_way_gives_the_same_bytes(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrated = awq_jax.quantize_checkpoint(checkpoint, tmp_path / "calibrated", TOKENS, **RTN)
    want = weights(tmp_path / "calibrated")
    assert all(row.error is not None for row in calibrated.report.layers)
    for hidden in ("memory", "disk"):
        done = awq_jax.quantize_checkpoint(checkpoint, tmp_path / hidden, hidden=hidden, **RTN)
        assert weights(tmp_path / hidden) == want
        assert done.report.tokens == 0
        assert "none" in done.report.calibration
        assert all(row.error is None for row in done.report.layers)
    model = awq_jax.load(checkpoint)
    report = model.quantize(**RTN)
    model.save(tmp_path / "model")
    assert weights(tmp_path / "model") == want
    assert len(report.layers) == len(calibrated.report.layers)
    options = ["--method", "rtn", "--group-size", "16", "--quiet"]
    assert entry.main(["quantize", str(checkpoint), str(tmp_path / "cli"), *options]) == 0
    assert weights(tmp_path / "cli") == want
    shown = capsys.readouterr().out
    assert "no calibration" in shown
    assert "typical error" not in shown
    assert entry.main(["quantize", str(checkpoint), str(tmp_path / "dry"), *options, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == 2


def test_other_methods_still_read_the_built_in_text() -> None:
    assert data.default(True) == "builtin"
    with pytest.raises(AssertionError, match="calibration text was asked for"):
        data.load(data.default(True))
    with pytest.raises(awq_jax.errors.CalibrationError, match="empty"):
        data.load(np.zeros((0, 4), np.int32))
