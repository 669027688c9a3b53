"""Tests that cut arrays over a mesh, once more where there are two devices to cut them over."""

import subprocess
import sys
from pathlib import Path

import pytest
import simulated_devices

CASES = (
    "serve/test_dot.py::test_gradients_of_shards_add_up",
    "kernels/test_grouped.py::test_vmap_and_each_device_its_own",
    "kernels/test_triton.py::test_each_shard_runs_its_own_kernel",
)


@pytest.mark.slow
def test_on_two_devices():
    env = simulated_devices.environment(2)
    quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", *quiet, *CASES]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
