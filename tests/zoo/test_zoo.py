"""Models of other people's packages, built by their own classes: shares, folds and errors; see `make_envs.sh`."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENVS = os.environ.get("AWQ_JAX_ZOO_ENVS", "")
FILES = {
    "models": "flax",
    "flax_examples": "flax",
    "maxtext_models": "maxtext",
    "more_models": "more",
}  # -> environment
MODELS = [
    (file, name)
    for file in FILES
    for name in re.findall(r"^@model\ndef (\w+)", (HERE / f"{file}.py").read_text(), re.MULTILINE)
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ENVS, reason="AWQ_JAX_ZOO_ENVS names the directory of make_envs.sh"),
]


def run(env: str, program: str, *arguments: str) -> dict:
    """The last line that a program of this folder prints in an environment."""
    command = [str(Path(ENVS) / env / "bin" / "python"), str(HERE / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("file", "name"), MODELS)
def test_a_model_of_another_package(file: str, name: str) -> None:
    got = run(FILES[file], "measure.py", file, name)
    assert "crash" not in got, got
    assert got["packed"] >= 0.95, got["left"]
    assert got["unlike"] == []
    assert got["error"] < got["rounded"]
    assert got["decoded"] is None or got["decoded"] < 1e-3


def test_a_checkpoint_of_maxtext_through_orbax_and_back(tmp_path: Path) -> None:
    """What is decoded with the model's cache is what the whole model makes of all tokens at once."""
    got = run("maxtext", "maxtext_checkpoint.py", str(tmp_path))
    assert got["packed"] == 7
    assert got["decoded"] == got["whole"]


def test_the_sampler_of_tunix_takes_a_packed_model() -> None:
    got = run("flax", "tunix_sampler.py")
    assert got["packed"] == got["dense"]
    assert got["difference"] < 1e-5
