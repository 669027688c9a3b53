"""Which kernel vLLM would take for packed linears on NVIDIA GPUs that are not here, by its own choice.

    python kernels_vllm.py LINEARS.json OUT.json

LINEARS is a list of ``{"format", "bits", "symmetric", "group_size" (-1: the column), "shape" [out, in]}``; OUT has for
each ``{"75": name, "80": name, "90": name}``, by compute capability: of the kernel, or ``"error: ..."``.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}

import torch
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.quantization import auto_awq, auto_gptq
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16 as ct
from vllm.model_executor.layers.quantization.utils import marlin_utils
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import DeviceCapability, PlatformEnum


class Gpu(CpuPlatform):
    """Answers as a GPU's platform does what the choice of kernels asks."""

    _enum = PlatformEnum.CUDA
    device_type = "cuda"
    capability = DeviceCapability(8, 0)

    @classmethod
    def get_device_capability(cls, device_id=0):
        return Gpu.capability


def choice(linear: dict) -> str:
    n, k = linear["shape"]
    bits, symmetric, group = linear["bits"], linear["symmetric"], linear["group_size"]
    if linear["format"] == "gemm":
        # As `AutoAWQConfig.get_quant_method`; its files have zero points also where all are the same.
        kind = auto_awq.AutoAWQConfig(bits, group, True, False).quant_type
        if not marlin_utils.check_marlin_supported(kind, group, True):
            return "AutoAWQLinearMethod"
        zeros = True
    elif linear["format"].startswith("gptq"):
        config = auto_gptq.AutoGPTQConfig(bits, group, linear.get("act_order", False), symmetric, False, {}, {})
        auto_gptq.AutoGPTQLinearMethod(config)
        kind, zeros = config.quant_type, False
    else:
        scheme = ct.CompressedTensorsWNA16(
            "channel" if group == -1 else "group", bits, None if group == -1 else group, symmetric
        )
        kind, zeros = scheme.quant_type, not symmetric
    return choose_mp_linear_kernel(
        MPLinearLayerConfig(
            full_weight_shape=(k, n), partition_weight_shape=(k, n), weight_type=kind, act_type=torch.float16,
            group_size=group, zero_points=zeros,
        )
    ).__name__  # fmt: skip


def main(given: str, out: str) -> None:
    for module in [m for name, m in sys.modules.items() if name.startswith("vllm.")]:
        if "current_platform" in vars(module):
            module.current_platform = Gpu()
    found = []
    for linear in json.loads(Path(given).read_text()):
        row = {}
        for capability in ((7, 5), (8, 0), (9, 0)):
            Gpu.capability = DeviceCapability(*capability)
            try:
                row["{}{}".format(*capability)] = choice(linear)
            except (ValueError, NotImplementedError) as error:
                row["{}{}".format(*capability)] = f"error: {' '.join(str(error).split())}"
        found.append(row)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
