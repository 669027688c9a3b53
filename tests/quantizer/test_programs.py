"""How many programs are compiled to quantize a Llama: what a user of a small model waits for."""

import subprocess
import sys

import tiny_checkpoints

MOST = 18

COUNT = """
import sys, jax, numpy as np
names = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **about: names.append(str(about)) if name.endswith("backend_compile_duration") else None
)
import awq_jax
tokens = np.random.default_rng(0).integers(0, 256, (8, 32)).astype(np.int32)
awq_jax.load(sys.argv[1], dtype="bfloat16").quantize(
    calib=tokens, samples=8, seq_len=32, batch_size=2, bits=4, group_size=32, progress=False
)
print(len(names), *names)
"""


def test_a_llama_takes_few_programs(tmp_path):
    """One size for both widths keeps the test short: with others a program of each kind comes on top for each shape."""
    tiny_checkpoints.checkpoint(tmp_path, hidden_size=64, intermediate_size=64)
    run = subprocess.run([sys.executable, "-c", COUNT, str(tmp_path)], capture_output=True, text=True, check=True)
    count, _, names = run.stdout.partition(" ")
    assert 0 < int(count) <= MOST, names
