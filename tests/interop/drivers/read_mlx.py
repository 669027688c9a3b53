"""Logits and greedy continuation by mlx-lm.

    python read_mlx.py CHECKPOINT IDS.npy OUT NEW_TOKENS

Writes OUT/logits.npy [T, V] float32, OUT/greedy.npy and OUT/modules.json, the class of each linear.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx_lm.generate import generate_step


def main(checkpoint: str, ids: str, out: str, new_tokens: str) -> None:
    model, _ = mlx_lm.load(checkpoint)
    model.set_dtype(mx.float32)  # the stored scales and biases, exactly; the arithmetic is then float32 too
    tokens = mx.array(np.load(ids).astype(np.int32))
    logits = np.array(model(tokens[None])[0].astype(mx.float32))
    steps = generate_step(tokens, model, max_tokens=int(new_tokens))
    greedy = np.array([int(token) for token, _ in steps])
    target = Path(out)
    np.save(target / "logits.npy", logits)
    np.save(target / "greedy.npy", greedy)
    leaves = model.named_modules()
    kinds = {name: type(m).__name__ for name, m in leaves if isinstance(m, nn.Linear | nn.QuantizedLinear)}
    (target / "modules.json").write_text(json.dumps(kinds))


if __name__ == "__main__":
    main(*sys.argv[1:])
