"""Trainings on two simulated devices against one: run by test_finetune in a process of its own.

``python finetune_on_devices.py CHECKPOINT DATA`` prints, for each way to share the work, how much the factors differ.
"""

import json
import sys
from pathlib import Path

import numpy as np

import awq_jax
from awq_jax.errors import ConfigError
from awq_jax.lora import rows, training

checkpoint, data = sys.argv[1:]
told: dict[str, object] = {}


def trained(mesh: int | None, devices: int) -> np.ndarray:
    """All factors after a few steps."""
    model = awq_jax.load(checkpoint, mesh=mesh)
    read, _ = rows.read(Path(data), model.tokenizer, 64)
    how = training.Training(rank=4, steps=3, every=3, accumulate=2, learning_rate=0.01, devices=devices)
    done = training.finetune(model, how, read, read[:1], progress=False)
    told[f"{mesh} {devices} held out"] = done.curve[-1]["held_out"]
    return np.concatenate([f.ravel() for own in done.adapter.factors.values() for f in (own.a, own.b)])


one = trained(None, 1)
for name, given in (("data", (None, 2)), ("tensor", (2, 1))):
    told[name] = float(np.abs(trained(*given) - one).max())
told["moved"] = float(np.abs(one).max())
for given in ((2, 2), (None, 4)):
    try:
        trained(*given)
    except ConfigError as e:
        told[str(given)] = str(e)
print(json.dumps(told))
