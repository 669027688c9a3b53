"""docs/guides/saving.md: packed trees saved here and loaded by a fresh process; what does not fit is refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import saved_trees

from awq_jax import convert, errors, paths


def test_every_way_in_a_fresh_process(tmp_path):
    saved_trees.save(tmp_path)
    command = [sys.executable, saved_trees.__file__, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert run.returncode == 0, run.stderr
    ways = json.loads(run.stdout)
    assert len(ways) == 18
    assert all(ways.values()), ways

    linen = convert.restore(tmp_path / "linen-store")
    with pytest.raises(errors.WeightError, match="blocks/0/layers/0/bias is missing"):
        convert.restore(tmp_path / "linen-store", like=saved_trees.models()["nnx"][2])
    state = convert.to_state(linen)
    kernel = state["params"]["up"]["kernel"]
    for damaged in ({"static": kernel["static"][:-1]}, {"scales": kernel["scales"][:1]}, {"qweight": None}):
        with pytest.raises(errors.WeightError, match="damaged"):
            convert.from_state({"kernel": kernel | damaged})
    with pytest.raises(errors.WeightError, match="lack bits, group size and axes"):
        convert.from_state({"kernel": {k: v for k, v in kernel.items() if k != "static"}})


def test_filled_refuses_other_leaves():
    like = {"a": np.zeros(3)}
    for leaves, problem in (({"a": np.zeros(2)}, "has shape"), ({"a": np.zeros(3), "b": 1}, "no parameter b")):
        with pytest.raises(errors.WeightError, match=problem):
            paths.filled(like, leaves)
