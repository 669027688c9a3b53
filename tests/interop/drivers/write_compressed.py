"""Quantize a float checkpoint with llm-compressor, to compressed-tensors' pack-quantized format.

    python write_compressed.py SRC DST BITS GROUP_SIZE SYMMETRIC

GROUP_SIZE -1 gives one scale per output channel; SYMMETRIC is 0 or 1.
"""

import sys

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(src: str, dst: str, bits: str, group: str, symmetric: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32, device_map="cpu")
    grouped = {"strategy": "group", "group_size": int(group)} if int(group) > 0 else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=int(bits), type="int", symmetric=symmetric == "1", **grouped)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(model=model, recipe=QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head"]))
    model.save_pretrained(dst, save_compressed=True)
    AutoTokenizer.from_pretrained(src).save_pretrained(dst)


if __name__ == "__main__":
    main(*sys.argv[1:])
