"""Logits and greedy continuation by llama.cpp.

    python read_llamacpp.py FILE.gguf IDS.npy OUT NEW_TOKENS

Writes OUT/logits.npy [T, V] float32, OUT/greedy.npy and OUT/text.json: token ids of a text, and the text
of its ids, by llama.cpp's reading of the file's tokenizer.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

F32 = llama_cpp.GGML_TYPE_F32
TEXT = "the cat said, he is Éa 12"


def main(checkpoint: str, ids: str, out: str, new_tokens: str) -> None:
    tokens = np.load(ids).tolist()
    # The cache in float32 and no flash attention: only the products with packed weights round.
    model = llama_cpp.Llama(
        checkpoint, n_ctx=128, n_threads=1, logits_all=True, verbose=False, type_k=F32, type_v=F32, flash_attn=False
    )
    model.eval(tokens)
    logits = np.array(model.scores[: len(tokens)], np.float32)
    greedy = []
    for _ in range(int(new_tokens)):
        greedy.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(greedy[-1:])
    target = Path(out)
    np.save(target / "logits.npy", logits)
    np.save(target / "greedy.npy", np.array(greedy))
    encoded = model.tokenize(TEXT.encode())
    text = {"text": TEXT, "ids": encoded, "decoded": model.detokenize(encoded).decode()}
    (target / "text.json").write_text(json.dumps(text))


if __name__ == "__main__":
    main(*sys.argv[1:])
