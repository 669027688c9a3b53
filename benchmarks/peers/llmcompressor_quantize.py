"""Quantize a checkpoint with llm-compressor, for ``vs_peers.py``; runs in llm-compressor's own environment.

    python llmcompressor_quantize.py MODEL_DIR TOKENS.npy OUT_DIR --group-size 64 --method awq

Imports nothing of awq_jax. Written as compressed-tensors, with zero points. Release 0.14 pins what it keeps between
layers to memory for a GPU also where there is none, which torch refuses: here it is not pinned.
"""

from unittest import mock

import arguments
import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("--method", choices=("awq", "rtn"), default="awq")
    args = parser.parse_args()
    rows = np.load(args.tokens).tolist()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, device_map="cpu")
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=args.group_size)
    groups = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
    rounding = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    if args.method == "rtn":
        oneshot(model=model, recipe=rounding)
    else:
        data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})
        with mock.patch.object(IntermediatesCache, "pin_memory"):
            oneshot(
                model=model,
                dataset=data,
                recipe=[AWQModifier(), rounding],
                max_seq_length=len(rows[0]),
                num_calibration_samples=len(rows),
            )
    model.save_pretrained(args.out, save_compressed=True)


if __name__ == "__main__":
    main()
