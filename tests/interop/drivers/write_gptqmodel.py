"""Quantize a float checkpoint with GPTQModel.

    python write_gptqmodel.py SRC DST FORMAT BITS GROUP_SIZE SYMMETRIC DESC_ACT IDS.npy

FORMAT is gptq, gptq_v2 or gemm (AutoAWQ's); SYMMETRIC and DESC_ACT are 0 or 1; IDS [S, T] calibrate.
"""

import os
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # read at import; its default for two cores is too few for it

import numpy as np
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT, METHOD


def main(src: str, dst: str, kind: str, bits: str, group: str, symmetric: str, desc_act: str, ids: str) -> None:
    config = QuantizeConfig(
        bits=int(bits),
        group_size=int(group),
        sym=symmetric == "1",
        desc_act=desc_act == "1",
        format={"gptq": FORMAT.GPTQ, "gptq_v2": FORMAT.GPTQ_V2, "gemm": FORMAT.GEMM}[kind],
        quant_method=METHOD.AWQ if kind == "gemm" else METHOD.GPTQ,
        device="cpu",
    )
    model = GPTQModel.load(src, config)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in np.load(ids)]
    model.quantize(rows, batch_size=1)
    model.save(dst)


if __name__ == "__main__":
    main(*sys.argv[1:])
