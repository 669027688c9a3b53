"""AutoAWQ's own packing of the weights of a GEMM checkpoint, in another of its layouts.

    python repack_autoawq.py SRC OUT.safetensors VERSION

VERSION is gemm, gemv, gemv_fast or marlin. There are no kernels for a CPU, but the classes that pack are
plain torch: OUT holds what each makes of the weights that AutoAWQ reads from SRC.
"""

import json
import sys
from pathlib import Path

import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.modules.linear.gemv import WQLinear_GEMV
from awq.modules.linear.gemv_fast import WQLinear_GEMVFast
from awq.modules.linear.marlin import WQLinear_Marlin
from awq.utils.packing_utils import dequantize_gemm, reverse_awq_order, unpack_awq
from safetensors.torch import load_file, save_file

CLASSES = {"gemm": WQLinear_GEMM, "gemv": WQLinear_GEMV, "gemv_fast": WQLinear_GEMVFast, "marlin": WQLinear_Marlin}


def main(src: str, out: str, version: str) -> None:
    group = json.loads((Path(src) / "config.json").read_text())["quantization_config"]["group_size"]
    stored = {name: tensor for file in Path(src).glob("*.safetensors") for name, tensor in load_file(file).items()}
    packed = {}
    for name in stored:
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        qweight, qzeros, scales = (stored[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
        _, zeros = reverse_awq_order(*unpack_awq(qweight, qzeros, 4), 4)
        weight = dequantize_gemm(qweight, qzeros, scales.float(), 4, group)
        linear = torch.nn.Linear(*weight.shape, bias=False)
        linear.weight.data = weight.T.contiguous()
        zeros = None if version == "marlin" else zeros & 15
        if version != "gemm":  # the other classes take the groups last
            scales, zeros = (None if t is None else t.T.contiguous() for t in (scales, zeros))
        made = CLASSES[version].from_linear(linear, 4, group, False, scales, zeros)
        packed |= {f"{module}.{part}": tensor.contiguous() for part, tensor in made.state_dict().items()}
    save_file(packed, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
