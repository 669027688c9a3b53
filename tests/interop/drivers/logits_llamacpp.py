"""Logits by llama.cpp of a file without a vocabulary.

    python logits_llamacpp.py FILE.gguf IDS.npy OUT.npy

Writes OUT.npy [T, V] float32.
"""

import sys

import llama_cpp
import numpy as np

F32 = llama_cpp.GGML_TYPE_F32


def main(checkpoint: str, ids: str, out: str) -> None:
    tokens = np.load(ids).tolist()
    model = llama_cpp.Llama(
        checkpoint, n_ctx=256, n_threads=1, logits_all=True, verbose=False, type_k=F32, type_v=F32,
        flash_attn=False,
    )  # fmt: skip
    model.eval(tokens)
    np.save(out, np.array(model.scores[: len(tokens)], np.float32))


if __name__ == "__main__":
    main(*sys.argv[1:])
