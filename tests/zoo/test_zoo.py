"""Models of other people's packages, built by their own classes: shares, folds and errors; see `make_envs.sh`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENVS = os.environ.get("AWQ_JAX_ZOO_ENVS", "")
MODELS = [line[4:].split("(")[0] for line in (HERE / "models.py").read_text().splitlines() if line.endswith("> Model:")]
MODELS = [name for name in MODELS if not name.startswith("_")]


@pytest.mark.slow
@pytest.mark.skipif(not ENVS, reason="AWQ_JAX_ZOO_ENVS names the directory of make_envs.sh")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_another_package(name: str) -> None:
    command = [str(Path(ENVS) / "flax" / "bin" / "python"), str(HERE / "measure.py"), name]
    run = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert run.returncode == 0, run.stderr[-3000:]
    got = json.loads(run.stdout.splitlines()[-1])
    assert "crash" not in got, got
    assert got["packed"] >= 0.95, got["left"]
    assert got["unlike"] == []
    assert got["error"] < got["rounded"]
