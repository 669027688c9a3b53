"""Logits of several checkpoints by mlx-lm, or the error that each was refused with.

    python logits_mlx.py IDS.npy OUT CHECKPOINT...

Writes OUT/NAME.npy [T, V] float32, computed in float32, or OUT/NAME.txt: the error.
"""

import sys
import traceback
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np


def main(ids: str, out: str, *checkpoints: str) -> None:
    tokens = mx.array(np.load(ids).astype(np.int32))
    for path in map(Path, checkpoints):
        try:
            model, _ = mlx_lm.load(str(path))
            model.set_dtype(mx.float32)
            np.save(Path(out, f"{path.name}.npy"), np.array(model(tokens[None])[0].astype(mx.float32)))
        except Exception as error:
            traceback.print_exc()
            Path(out, f"{path.name}.txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
