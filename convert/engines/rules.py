"""What serving engines do with a checkpoint: rules, each observed in the engine of the version named here.

A rule is data: of which engine and formats it is, when it applies, and what the engine then does.
``benchmarks/results/inspect.json`` has what the engines did with files of every kind, and tests hold the rules to it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from awq_jax.convert.config_json import HfConfig
from awq_jax.convert.engines.contents import Contents, Linear
from awq_jax.convert.formats.awq import scaled_activations
from awq_jax.convert.formats.records import HEAD

VERSIONS = {
    "vllm": "vLLM 0.32",
    "transformers": "transformers 5.24",
    "tpu-inference": "tpu-inference 0.32",
    "mlx": "mlx-lm 0.32",
    "llama.cpp": "llama-cpp-python 0.3.36",
}
# What "serves" is said of, where a CPU differs.
HARDWARE = {"vllm": "NVIDIA GPUs", "transformers": "GPUs"}
GGUF = ("gguf", "gguf-q4_0", "gguf-q4_1", "gguf-q8_0")
GPTQ = ("gptq", "gptq-v2")
PACKED = ("gemm", "compressed-tensors", *GPTQ)  # what vLLM reads of these
READS = {
    "vllm": ("float", *PACKED),
    "transformers": ("float", *PACKED, *GGUF),
    "tpu-inference": ("float", "gemm", "compressed-tensors"),  # packed ones by `awq_jax.vllm`
    "mlx": ("float", "mlx", "gemm"),
    "llama.cpp": GGUF,
}
INSTEAD = {
    "vllm": "convert it to gemm or compressed-tensors",
    "transformers": "convert it to compressed-tensors",
    "tpu-inference": "convert it to gemm or compressed-tensors",
    "mlx": "convert it to mlx",
    "llama.cpp": "convert it to gguf-q4_1",
}
MOE_CONVERTED = re.compile(r"\.experts\.\d+\.")
# Families whose packed experts transformers has no names for: it publishes and reads them as one tensor.
STACKED = ("granitemoe", "granitemoeshared", "gpt_oss")
# transformers' code of these reads .weight of a linear, which a packed one does not have.
NO_WEIGHT = {"gemm": ("gpt_bigcode",), "compressed-tensors": ("gpt_bigcode", "falcon")}
# gpt_oss: KeyError for its single experts, in compressed-tensors other results; bloom: its loader turns a packed tensor
# as if it were float; phimoe: its model fails, float too.
NOT_PACKED_IN_VLLM = ("gpt_oss", "bloom", "phimoe")
NO_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")  # "numerical instability"; it takes bfloat16 by itself
# Its router of experts on a CPU takes softmax alone (AssertionError), and leaves out ERNIE's correction.
NO_ROUTER_ON_CPU = ("minimax_m2", "ernie4_5_moe")
# GPTQModel does not replace the linears of these in gptq, which are of classes of their own.
NO_GPTQ = ("falcon", "gpt2")
UNJOINED = ("glm4", "gptj", "stablelm", "minicpm3")
PLUGIN_RUN = ("llama", "qwen2", "qwen3")
# Published with code of their own, which engines run from the checkpoint, and which is never written here.
OWN_CODE = ("Yi", "aquila", "baichuan", "internlm2", "minicpm", "qwen", "exaone")
ABSENT = {  # families that are none of an engine's
    "vllm": (*OWN_CODE, "internlm3", "mpt", "RefinedWeb", "RefinedWebModel", "phimoe"),
    "transformers": (*OWN_CODE, "kimi_k2", "RefinedWeb", "RefinedWebModel"),
    "mlx": (
        "RefinedWeb", "RefinedWebModel", "Yi", "aquila", "arcee", "baichuan", "bloom", "cwm", "falcon",
        "granitemoeshared", "llava_next", "ministral", "mpt", "opt", "phi3_v", "qwen2_5_omni", "vaultgemma",
    ),
}  # fmt: skip
MARLIN_GROUPS = (32, 64, 128)  # or the column


@dataclasses.dataclass(frozen=True)
class Rule:
    """What an engine does with some checkpoints of formats that it reads.

    Attributes:
      engine: its name.
      formats: of which the rule is.
      when: the linears, or anything else nameable, that it applies to; nothing where it does not.
      says: what happens; ``{}`` for the first of them.
      stops: the engine does not serve the checkpoint.
      where: of which hardware that is, ``"cpu"`` or ``"gpu"``; of any, if empty.
    """

    engine: str
    formats: tuple[str, ...]
    when: Callable[[Contents], Sequence[str]]
    says: str
    stops: bool = True
    where: str = ""


def _some(test: Callable[[Linear], bool]) -> Callable[[Contents], list[str]]:
    return lambda c: [x.name for x in c.linears if test(x)]


def _family(test: Callable[[Contents], bool]) -> Callable[[Contents], list[str]]:
    return lambda c: [c.family] if c.linears and test(c) else []


def _one_of(families: Sequence[str]) -> Callable[[Contents], list[str]]:
    """Whatever is packed in it."""
    return lambda c: [c.family] if c.family in families else []


def _finer(c: Contents) -> list[str]:
    """Linears whose scales bfloat16 does not hold."""
    return [x.name for x in c.linears if x.scales != "bfloat16"]


def _dtypes(config: HfConfig) -> tuple[Any, Any]:
    return config.get("dtype"), config.get("torch_dtype")


def _marlin(x: Linear) -> bool:
    return x.whole or x.group_size in MARLIN_GROUPS


def _has_experts(c: Contents) -> bool:
    return any(MOE_CONVERTED.search(x.name) for x in c.linears)


RULES = (
    *(
        Rule(
            engine,
            READS[engine],
            _one_of(absent),
            "does not have the family {}",
        )
        for engine, absent in ABSENT.items()
    ),
    Rule(
        "vllm",
        READS["vllm"],
        _one_of(NO_ROUTER_ON_CPU),
        "computes on a CPU no router as that of {}",
        where="cpu",
    ),
    Rule("vllm", PACKED, _family(lambda c: c.family in NOT_PACKED_IN_VLLM), "does not load it packed: {}"),
    Rule(
        "vllm",
        GPTQ,
        _family(lambda c: c.family in UNJOINED),
        "does not know of {} which linears it joins, and in gptq takes them for float (AttributeError, KeyError)",
    ),
    Rule("vllm", ("gemm",), lambda c: c.scaled, "stops at the scaled activation of {} (KeyError)"),
    Rule("vllm", GPTQ, _some(lambda x: not x.symmetric), "refuses GPTQ with zero points: {}"),
    Rule("vllm", GPTQ, _some(lambda x: x.bits < 4), "refuses 2 and 3 bits in gptq: {}"),
    Rule("vllm", GPTQ, _some(lambda x: not _marlin(x)), "refuses groups other than 32, 64, 128 in gptq: {}"),
    Rule("vllm", GPTQ, _some(lambda x: x.act_order and not x.whole), "refuses act-order with groups: {}"),
    Rule("vllm", ("compressed-tensors",), _some(lambda x: x.act_order), "refuses act-order by groups: {}"),
    Rule(
        "vllm", ("compressed-tensors",), _some(lambda x: x.bits not in (4, 8)), "has no kernel but for 4 and 8 bits: {}"
    ),
    Rule(
        "vllm",
        ("compressed-tensors",),
        _some(lambda x: x.bits == 8 and not x.symmetric and not (x.whole or x.group_size in (64, 128))),
        "has no kernel for zero points of 8 bits but with groups of 64, 128 or the column (on Hopper): {}",
    ),
    Rule(
        "vllm",
        ("compressed-tensors",),
        _some(lambda x: x.bits == 8 and not x.symmetric and (x.whole or x.group_size in (64, 128))),
        "multiplies 8 bits with zero points on Hopper GPUs alone: {}",
        stops=False,
    ),
    Rule(
        "vllm",
        ("compressed-tensors",),
        _some(lambda x: x.bits == 4 and not x.symmetric and not (_marlin(x) or x.group_size == 256)),
        "has no kernel on GPUs for zero points with groups of other sizes than 32, 64, 128, 256 or the column: {}",
        where="gpu",
    ),
    Rule(
        "vllm",
        ("compressed-tensors",),
        _some(lambda x: x.symmetric and not _marlin(x)),
        "multiplies on GPUs in float16 only (--dtype float16) where groups are none of 32, 64, 128: {}",
        stops=False,
    ),
    Rule(
        "vllm",
        ("compressed-tensors", *GPTQ),
        _some(lambda x: x.bits == 8),
        "has no kernel for 8 bits on a CPU ({})",
        where="cpu",
    ),
    Rule(
        "vllm",
        PACKED,
        _some(lambda x: bool(x.shape[0] % 32 or x.shape[-1] % 32)),
        "has no kernel on a CPU for sizes that 32 does not divide ({})",
        where="cpu",
    ),
    Rule(
        "vllm",
        ("compressed-tensors",),
        _some(lambda x: MOE_CONVERTED.search(x.name) is not None),
        "has no kernel on a CPU for experts in compressed-tensors ({})",
        where="cpu",
    ),
    Rule(
        "vllm",
        PACKED,
        lambda c: _finer(c) if c.family not in NO_FLOAT16 and "bfloat16" in _dtypes(c.config) else [],
        "computes in bfloat16 by default (dtype of config.json), to which it rounds finer scales ({}): serve with "
        "--dtype float16, unless quantized with --serve-dtype bfloat16",
        stops=False,
    ),
    Rule(
        "vllm",
        PACKED,
        lambda c: _finer(c) if c.family in NO_FLOAT16 else [],
        "computes this family in bfloat16, never in float16, and rounds finer scales to it ({}), unless quantized with "
        "--serve-dtype bfloat16",
        stops=False,
    ),
    Rule("transformers", GGUF, _family(lambda c: True), "makes it float", stops=False),
    Rule(
        "transformers",
        GGUF,
        lambda c: [str(c.config.get("head_dim"))] if c.family == "qwen3" and c.config.get("head_dim") != 128 else [],
        "takes heads of Qwen 3 in GGUF for 128 wide, whatever the file says ({})",
    ),
    Rule(
        "transformers", ("gemm", *GPTQ), _family(_has_experts), "has no place in AWQ and GPTQ for single experts ({})"
    ),
    Rule(
        "transformers",
        ("gemm", *GPTQ),
        _some(lambda x: x.bits == 4 and x.group_size not in (32, 64, 128, 256)),
        "multiplies on a CPU groups of 32, 64, 128 and 256 alone ({}); GPTQModel's kernels for GPUs were not run",
        where="cpu",
    ),
    Rule(
        "transformers",
        GPTQ,
        _family(lambda c: c.family in NO_GPTQ),
        "with GPTQModel does not load {} in gptq (missing keys, or .weight of a packed linear)",
    ),
    Rule(
        "transformers",
        GPTQ,
        _some(lambda x: not re.search(r"\.\d+\.", x.name) and not HEAD.search(x.name)),
        "with GPTQModel packs in gptq what is in layers alone, and takes {} for float",
    ),
    Rule(
        "transformers",
        ("compressed-tensors",),
        _some(lambda x: x.act_order),
        "with compressed-tensors 0.20 knows of no act-order by groups: {}",
    ),
    Rule(
        "transformers",
        ("gemm", "compressed-tensors"),
        _family(lambda c: c.family == "gpt2"),
        "does not replace GPT-2's linears ({})",
    ),
    Rule("mlx", ("gemm",), _family(lambda c: c.family == "gpt2"), "does not replace GPT-2's linears ({})"),
    Rule(
        "transformers",
        ("gemm", "compressed-tensors"),
        _family(lambda c: c.family in NO_WEIGHT[c.format]),
        "reads .weight of a packed linear ({})",
    ),
    Rule(
        "transformers",
        ("gemm",),
        _family(lambda c: scaled_activations.are_in(c.config) and not c.scaled),
        "computes with unset memory where {} has no scaled activations: convert it to compressed-tensors",
    ),
    Rule("transformers", ("gemm", *GPTQ), _family(lambda c: True), "needs GPTQModel for it", stops=False),
    Rule(
        "transformers",
        ("compressed-tensors",),
        _family(lambda c: _has_experts(c) and c.family in STACKED),
        "knows of {} only stacked experts",
    ),
    Rule(
        "transformers",
        ("compressed-tensors",),
        lambda c: [x.name for x in c.linears if not x.symmetric and MOE_CONVERTED.search(x.name)],
        "leaves out the zero points of experts: {}",
    ),
    Rule(
        "transformers",
        ("compressed-tensors",),
        _some(lambda x: not x.symmetric and not MOE_CONVERTED.search(x.name)),
        "since 5.23, with compressed-tensors 0.18 or later, cannot load zero points ({}) but for "
        "CompressedTensorsConfig(dequantize=True); 5.22, or compressed-tensors 0.17, can",
    ),
    Rule(
        "tpu-inference",
        ("compressed-tensors",),
        _some(lambda x: x.bits not in (4, 8) or x.act_order),
        "takes 4 and 8 bits without act-order: {}",
    ),
    Rule("tpu-inference", ("gemm", "compressed-tensors"), _family(_has_experts), "takes no packed experts ({})"),
    Rule(
        "tpu-inference",
        ("compressed-tensors",),
        _some(lambda x: HEAD.search(x.name) is not None),
        "takes a packed head in gemm, not in compressed-tensors ({})",
    ),
    Rule(
        "tpu-inference",
        ("gemm", "compressed-tensors"),
        _family(lambda c: c.family not in PLUGIN_RUN),
        "that was not run for {}: Llama, Qwen 2 and Qwen 3 were",
        stops=False,
    ),
    Rule(
        "tpu-inference",
        ("gemm", "compressed-tensors"),
        _family(lambda c: True),
        "with awq-jax installed beside it",
        stops=False,
    ),
    Rule("mlx", ("gemm",), _family(_has_experts), "reads in gemm no single experts ({})"),
    Rule("mlx", ("gemm",), lambda c: c.scaled, "has no scaled activations ({})"),
    Rule("mlx", ("gemm",), _some(lambda x: x.group_size not in MARLIN_GROUPS), "takes groups of 32, 64 and 128: {}"),
)
