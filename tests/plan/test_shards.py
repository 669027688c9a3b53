"""Weights that a shard_map splits over devices are multiplied packed, each device by its part."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import simulated_devices

CASES = str(Path(simulated_devices.__file__).with_name("shard_cases.py"))


@pytest.mark.parametrize("names", ["tensor_parallel", pytest.param("expert_parallel layers", marks=pytest.mark.slow)])
def test_weights_split_over_four_devices(names):
    command = [sys.executable, CASES, *names.split()]
    run = subprocess.run(command, capture_output=True, text=True, env=simulated_devices.environment(4))
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert list(found) == names.split()
    for name, got in found.items():
        used = ["down", "up"] if name == "tensor_parallel" else ["downs", "ups"]
        assert got["sites"] == sorted([*used, "head"]), name
        assert got["skipped"] == {}, name
        assert got["packed"] == used, name
        assert got["stats"] < 1e-5, name
        assert got["output"] < 1e-4, name
        assert got["words"] == ["columns", "rows"], f"{name}: a weight was made float before it was split"
