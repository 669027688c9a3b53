"""Log-probabilities of several checkpoints by vLLM's engine, each or the error that it was refused with.

    python read_vllm.py KERNELS DTYPE IDS.npy OUT CHECKPOINT...

KERNELS is engine (all its own), plain or chosen: products with 4-bit weights are then those of dequantized weights.
What the engine's own loader made of the files is dequantized here, after it has joined and laid out the layers; only
the kernels for 4 bits, which need AVX-512, and AMX for experts, are left out. With chosen, the engine says itself
whether it has a kernel, as on a processor that has both; with plain, all 4 bits are taken. Writes OUT/NAME.npy [T, V]
float32, or OUT/NAME.txt: the error.
"""

import gc
import logging
import os
import sys
import traceback
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_MLA_DISABLE": "1",  # its latent attention has sizes of heads that no tiny model has
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "2",
}

import numpy as np
import torch

NAMES = {  # packed codes, scales and zero points of joined experts, by method
    "AutoAWQMoEMethod": ("qweight", "scales", "qzeros"),
    "AutoGPTQMoEMethod": ("qweight", "scales", "qzeros"),
    "CompressedTensorsWNA16MoEMethod": ("weight_packed", "weight_scale", "weight_zero_point"),
}
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def unpacked(words: torch.Tensor, dim: int, order: list[int] | None = None) -> torch.Tensor:
    """Codes of int32 words of eight, which lie along `dim`."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (words.movedim(dim, -1)[..., None] >> shifts) & 15
    if order:
        codes = codes[..., order]
    return codes.flatten(-2).movedim(-1, dim)


def dequantized(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | int) -> torch.Tensor:
    """[..., out, in] of codes of that shape, and scales and zero points [..., out, groups]."""
    group = codes.shape[-1] // scales.shape[-1]
    if isinstance(zeros, torch.Tensor):
        zeros = zeros.repeat_interleave(group, -1)
    return (codes - zeros) * scales.repeat_interleave(group, -1)


def plain_kernels(all_of_4_bits: bool = True) -> None:
    """Put dequantization in the place of the CPU's int4 kernels, for all weights of 4 bits or for those they take."""
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.quantization import auto_awq, auto_gptq
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as ct_moe,
    )
    from vllm.scalar_type import scalar_types

    def can_implement(c):
        return c.weight_type in (scalar_types.uint4, scalar_types.uint4b8), "not 4 bits"

    def prepare(self, layer):
        words, scales, zeros = self._get_weight_params(layer)
        codes = unpacked(words.data, words.packed_dim)
        codes = codes.t() if words.input_dim == 0 else codes
        steps = scales.data.t() if scales.output_dim == 1 else scales.data
        points = 8
        if self.config.zero_points:
            points = unpacked(zeros.data, zeros.packed_dim)
            points = points.t() if zeros.output_dim == 1 else points
        layer.dequantized = dequantized(codes, steps, points).to(self.config.act_type)

    def multiply(self, layer, x, bias=None):
        return torch.nn.functional.linear(x, layer.dequantized, bias)

    if all_of_4_bits:
        CPUWNA16LinearKernel.can_implement = staticmethod(can_implement)
    CPUWNA16LinearKernel.process_weights_after_loading = prepare
    CPUWNA16LinearKernel.apply_weights = multiply

    def prepare_experts(self, layer):
        kind = type(self).__name__
        codes_name, scales_name, zeros_name = NAMES[kind]
        for which in ("w13", "w2"):
            words, scales = (getattr(layer, f"{which}_{n}").data for n in (codes_name, scales_name))
            zeros = getattr(layer, f"{which}_{zeros_name}", None)
            if kind == "AutoAWQMoEMethod":
                codes, points = (unpacked(w, 2, AWQ_ORDER).mT for w in (words, zeros.data))
                scales = scales.mT
            elif kind == "AutoGPTQMoEMethod":
                codes, scales, points = unpacked(words, 1).mT, scales.mT, 8
            else:
                codes, points = unpacked(words, 2), 8 if zeros is None else unpacked(zeros.data, 1)
            weight = dequantized(codes, scales, points).to(scales.dtype)
            layer.register_parameter(f"{which}_weight", torch.nn.Parameter(weight, requires_grad=False))
        if kind == "AutoGPTQMoEMethod":  # it makes room for biases of any model
            for name in {"w13_bias", "w2_bias"} - set(layer._loaded_expert_biases):
                layer.register_parameter(name, None)
        plain = UnquantizedFusedMoEMethod(self.moe)
        plain.process_weights_after_loading(layer)
        self.moe_kernel, self.moe_quant_config = plain.moe_kernel, plain.moe_quant_config

    CPUExpertsInt4._supports_current_device = staticmethod(lambda: True)
    for module in (auto_awq, auto_gptq, ct_moe):
        if all_of_4_bits:
            module.select_wna16_moe_backend = lambda *_, **__: (WNA16MoEBackend.CPU, CPUExpertsInt4)
        for name in NAMES:
            if hasattr(module, name):
                getattr(module, name).process_weights_after_loading = prepare_experts
    every = [torch.float16, torch.bfloat16, torch.float32] if all_of_4_bits else [torch.float16, torch.bfloat16]
    for config in (auto_awq.AutoAWQConfig, auto_gptq.AutoGPTQConfig, compressed_tensors.CompressedTensorsConfig):
        config.get_supported_act_dtypes = classmethod(lambda cls: every)


def opened(path: Path, dtype: str, **more):
    """The engine with a checkpoint."""
    from vllm import LLM

    settings = {
        "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 64, "max_logprobs": -1,
        "kv_cache_memory_bytes": 64 << 20, "limit_mm_per_prompt": {"image": 0, "video": 0},
        "enable_prefix_caching": False, "disable_log_stats": True, "skip_mm_profiling": True,
    }  # fmt: skip
    return LLM(model=str(path), dtype=dtype, **settings | more)


def table_of(rows) -> np.ndarray:
    """[len(rows), V] float32 of the engine's log-probabilities by token; NaN where it gave none."""
    table = np.full((len(rows), max(map(len, rows))), np.nan, np.float32)
    for row, found in zip(table, rows, strict=True):
        for token, one in found.items():
            row[token] = one.logprob
    return table


def log_probabilities(path: Path, tokens: list[int], dtype: str) -> np.ndarray:
    from vllm import SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = None
    try:
        llm = opened(path, dtype)
        ask = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, logprobs=-1, detokenize=False)
        answer = llm.generate({"prompt_token_ids": tokens}, ask, use_tqdm=False)[0]
        return table_of([*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs])
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def hasten(registry) -> None:
    """Once for a process what the engine does for each model: many are read here, and all are tiny."""
    from vllm.platforms import current_platform

    registry._run_in_subprocess = lambda what: what()  # what it asks of a model's class
    collect, own = gc.collect, current_platform.register_triton_kernel_overrides
    gc.collect = lambda *_: 0  # sixteen times for each model, of a heap that is mostly modules

    def once() -> None:
        own()
        type(current_platform).register_triton_kernel_overrides = staticmethod(lambda: None)
        collect()
        gc.freeze()

    type(current_platform).register_triton_kernel_overrides = staticmethod(once)


def main(kernels: str, dtype: str, ids: str, out: str, *checkpoints: str) -> None:
    logging.disable(logging.WARNING)
    from vllm.model_executor.models import registry

    hasten(registry)
    if kernels != "engine":
        plain_kernels(kernels == "plain")
    tokens = np.load(ids).tolist()
    for path in map(Path, checkpoints):
        refusal, result = Path(out, f"{path.name}.txt"), Path(out, f"{path.name}.npy")
        refusal.write_text("the process died")
        try:
            np.save(result, log_probabilities(path, tokens, dtype))
            refusal.unlink()
        except Exception as error:
            traceback.print_exc()
            what = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
            refusal.write_text(f"{type(error).__name__}: {what}")


if __name__ == "__main__":
    main(*sys.argv[1:])
