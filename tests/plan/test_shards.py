"""Weights that a shard_map splits over devices are multiplied packed, each device by its part."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import simulated_devices

CASES = str(Path(simulated_devices.__file__).with_name("shard_cases.py"))


def run(*names):
    command = [sys.executable, CASES, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=simulated_devices.environment(4))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert list(found) == list(names)
    return found


@pytest.mark.parametrize("names", ["tensor_parallel", pytest.param("expert_parallel layers", marks=pytest.mark.slow)])
def test_weights_split_over_four_devices(names):
    for name, got in run(*names.split()).items():
        used = ["down", "up"] if name == "tensor_parallel" else ["downs", "ups"]
        assert got["sites"] == sorted([*used, "head"]), name
        assert got["skipped"] == {}, name
        assert got["packed"] == used, name
        assert got["stats"] < 1e-5, name
        assert got["output"] < 1e-4, name
        assert got["words"] == ["columns", "rows"], f"{name}: a weight was made float before it was split"


def test_sharded_parameters_are_packed_where_they_lie():
    got = run("arriving")["arriving"]
    assert got["same"], "what is stored does not depend on where it lies"
    assert got["apart"] < 1e-5
    assert got["shards"] == {
        "ups": [[2, 4, 64], [2, 1, 64]],  # two of four experts, half of 128 columns
        "downs": [[2, 8, 32], [2, 2, 32]],  # half of the rows: two groups of 32
        "up": [[4, 32], [1, 32]],  # a quarter of the columns
        "down": [[4, 32], [1, 32]],  # a quarter of the rows, one group
    }
