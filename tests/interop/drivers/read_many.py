"""Logits of several checkpoints by one program, each or the error that it was refused with.

    python read_many.py LOADER IDS.npy OUT CHECKPOINT...

LOADER is transformers (with the library that the quantization needs), dequantized (the same, asked to make
compressed-tensors' weights float as it loads them) or gptqmodel (GPTQModel's own loader, which takes experts apart).
Writes OUT/NAME.npy [T, V] float32, or OUT/NAME.txt: the error.
"""

import gc
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # read at import; its default for two cores is too few for it

import numpy as np
import torch


def by_transformers(path: Path, **more) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if path.suffix == ".gguf":
        path, more = path.parent, more | {"gguf_file": path.name}
    config = AutoConfig.from_pretrained(path, **more)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    settings = {"dtype": torch.float32, "device_map": "cpu", "output_loading_info": True} | more
    if getattr(config, "attn_logit_softcapping", None):
        settings["attn_implementation"] = "eager"  # the default leaves out the cap in some releases
    model, problems = kind.from_pretrained(path, **settings)
    faults = {what: sorted(map(str, names)) for what, names in problems.items() if names}
    if faults:
        raise RuntimeError("; ".join(f"{what}: {len(names)}, as {names[0]}" for what, names in faults.items()))
    return model


def dequantized(path: Path) -> torch.nn.Module:
    from transformers import CompressedTensorsConfig

    return by_transformers(path, quantization_config=CompressedTensorsConfig(dequantize=True))


def by_gptqmodel(path: Path) -> torch.nn.Module:
    from gptqmodel import GPTQModel
    from safetensors import safe_open

    model = GPTQModel.load(str(path), device="cpu", dtype=torch.float32).model
    taken = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    stored = {name for file in path.glob("*.safetensors") for name in safe_open(file, "pt").keys()}  # noqa: SIM118
    for what, names in (("not read", stored - taken), ("not set", taken - stored)):
        left = sorted(name for name in names if not name.endswith(("inv_freq", "lm_head.weight")))
        if left:  # it goes on with whatever the memory held
            raise RuntimeError(f"{what}: {len(left)} tensors, as {left[0]}")
    return model


LOADERS = {"transformers": by_transformers, "dequantized": dequantized, "gptqmodel": by_gptqmodel}


def main(loader: str, ids: str, out: str, *checkpoints: str) -> None:
    tokens = torch.from_numpy(np.load(ids).astype(np.int64))[None]
    for path in map(Path, checkpoints):
        try:
            model = LOADERS[loader](path).eval()
            with torch.no_grad():
                logits = model(input_ids=tokens).logits[0].float().numpy()
            np.save(Path(out, f"{path.name}.npy"), logits)
        except Exception as error:
            traceback.print_exc()
            Path(out, f"{path.name}.txt").write_text(f"{type(error).__name__}: {error}")
        model = None
        gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
