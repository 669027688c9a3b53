"""An engine whose weights and cache are spread over simulated devices."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import simulated_devices
import tiny_checkpoints

HELPERS = Path(tiny_checkpoints.__file__).parent
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[2])
import awq_jax, served
from awq_jax.serve import Engine
prompts = [[5, 6, 7], list(range(30)), [9]]
want = [list(a.ids) for a in awq_jax.load(sys.argv[1]).answers(prompts, max_new_tokens=8)]
engine = Engine(awq_jax.load(sys.argv[1], mesh=2), slots=2, length=48, chunk=16)
got = served.answers(engine, prompts, max_new_tokens=8)
cut = str(engine.turns.cache.layers[0].keys.sharding.spec)
print(json.dumps({"want": want, "got": got, "late": engine.programs.late, "cut": cut}))
"""


@pytest.mark.slow
def test_answers_on_two_devices(tmp_path):
    tiny_checkpoints.checkpoint(tmp_path / "tiny")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "tiny"), str(HELPERS)]
    done = subprocess.run(command, env=simulated_devices.environment(2), capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["got"] == told["want"]
    assert told["late"] == 0
    assert "model" in told["cut"]
