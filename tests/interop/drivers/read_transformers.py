"""Logits and greedy continuation by transformers, with the library its quantization needs.

    python read_transformers.py CHECKPOINT IDS.npy OUT NEW_TOKENS

CHECKPOINT is a directory, or a .gguf file. Writes OUT/logits.npy [T, V] float32, OUT/greedy.npy and
OUT/modules.json, the class of each linear: what computed, and that it was not a float copy.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main(checkpoint: str, ids: str, out: str, new_tokens: str) -> None:
    path = Path(checkpoint)
    where = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    model, problems = AutoModelForCausalLM.from_pretrained(
        where[0], **where[1], dtype=torch.float32, device_map="cpu", output_loading_info=True
    )
    faults = {kind: sorted(map(str, names)) for kind, names in problems.items() if names}
    if faults:
        raise SystemExit(f"loading {checkpoint}: {faults}")
    model.eval()
    tokens = torch.from_numpy(np.load(ids).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(tokens).logits[0].float().numpy()
        count = int(new_tokens)
        # min_new_tokens would forbid the end token and so change the choice; no end token is what is meant.
        model.generation_config.eos_token_id = None
        text = model.generate(tokens, do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0)
    target = Path(out)
    np.save(target / "logits.npy", logits)
    np.save(target / "greedy.npy", text[0, tokens.shape[1] :].numpy())
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if name.endswith(("_proj", "lm_head"))}
    (target / "modules.json").write_text(json.dumps(kinds))


if __name__ == "__main__":
    main(*sys.argv[1:])
