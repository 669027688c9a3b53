"""Quantize a checkpoint with GPTQModel, for ``vs_peers.py``; runs in GPTQModel's own environment.

    python gptqmodel_quantize.py MODEL_DIR TOKENS.npy OUT_DIR --group-size 64 --method gptq

Imports nothing of awq_jax. Of two cores it leaves its workers none unless told how many there are, and that is read
when it is imported. Its defaults otherwise: GPTQ symmetric, without act-order, here in float32; AWQ
with zero points, in bfloat16, since it refuses float32.
"""

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count()))

import arguments
import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT, METHOD


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("--method", choices=("gptq", "awq"), default="gptq")
    args = parser.parse_args()
    awq = args.method == "awq"
    config = QuantizeConfig(
        bits=4,
        group_size=args.group_size,
        sym=not awq,
        format=FORMAT.GEMM if awq else FORMAT.GPTQ,
        quant_method=METHOD.AWQ if awq else METHOD.GPTQ,
        device="cpu",
    )
    model = GPTQModel.load(args.model, config, dtype=torch.bfloat16 if awq else torch.float32)
    rows = np.load(args.tokens).tolist()
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    model.save(args.out)


if __name__ == "__main__":
    main()
