"""What serving engines do with a checkpoint: rules, each observed in the engine of the version named here.

A rule is data: of which engine and formats it is, when it applies, and what the engine then does. `verdict` puts
those together that apply to one checkpoint. What was run and what was only read in an engine's source is said in
``docs/guides/serving.md``; tests hold the rules to what the engines did.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from awq_jax.convert.config_json import HfConfig
from awq_jax.convert.format import Record
from awq_jax.convert.formats import joined_linears
from awq_jax.convert.formats.awq import scaled_activations
from awq_jax.convert.formats.records import HEAD
from awq_jax.convert.source import Source

VERSIONS = {
    "vllm": "vLLM 0.32",
    "transformers": "transformers 5.24",
    "tpu-inference": "tpu-inference 0.32",
    "mlx": "mlx-lm 0.32",
    "llama.cpp": "llama-cpp-python 0.3.36",
}
GGUF = ("gguf", "gguf-q4_0", "gguf-q4_1", "gguf-q8_0")
READS = {
    "vllm": ("float", "gemm", "compressed-tensors", "gptq"),
    "transformers": ("float", "gemm", "compressed-tensors", "gptq", "gptq-v2", *GGUF),
    "tpu-inference": ("float", "gemm", "compressed-tensors"),  # packed ones by `awq_jax.vllm`
    "mlx": ("float", "mlx"),
    "llama.cpp": GGUF,
}
INSTEAD = {
    "vllm": "convert it to gemm or compressed-tensors",
    "transformers": "convert it to compressed-tensors",
    "tpu-inference": "convert it to gemm or compressed-tensors",
    "mlx": "convert it to mlx",
    "llama.cpp": "convert it to gguf-q4_1",
}
# Linears whose inputs are divided among the devices of a tensor-parallel engine; of others it is the outputs.
ROW_PARALLEL = re.compile(
    r"(^|\.)(o_proj|down_proj|out_proj|dense|dense_4h_to_h|c_proj|fc2|fc_out|wo|w2|feed_forward\.w2|output_linear)$"
)
MARLIN = (128, 64)  # inputs and outputs of one device: the kernel's tiles
MARLIN_GROUPS = (32, 64, 128)
MOE_CONVERTED = re.compile(r"\.experts\.\d+\.")
# Families whose packed experts transformers has no names for: it publishes and reads them as one tensor.
STACKED = ("granitemoe", "granitemoeshared", "gpt_oss")
# transformers' code of these reads .weight of a linear, which a packed one does not have.
NO_WEIGHT = {"gemm": ("gpt_bigcode",), "compressed-tensors": ("gpt_bigcode", "falcon")}
# gpt_oss: KeyError for its single experts, in compressed-tensors other results; bloom: its loader turns a packed tensor
# as if it were float; phimoe: its model fails, float too; mpt: supported until vLLM 0.28.
NOT_IN_VLLM = ("gpt_oss", "bloom", "phimoe", "mpt")
NO_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")  # "numerical instability"; it takes bfloat16 by itself
UNJOINED = ("glm4", "gptj", "stablelm", "minicpm3")
PLUGIN_RUN = ("llama", "qwen2", "qwen3")
# Published with code of their own, which transformers runs from the checkpoint, and which is never written here.
OWN_CODE = (
    "Yi", "aquila", "baichuan", "internlm2", "minicpm", "qwen", "exaone", "RefinedWeb", "RefinedWebModel", "kimi_k2",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Linear:
    """A packed linear: its module's name, ``[out, in]`` and how it is packed."""

    name: str
    shape: tuple[int, ...]
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    scales: str

    @property
    def whole(self) -> bool:
        """One scale for a whole column."""
        return self.group_size >= self.shape[-1]


@dataclasses.dataclass(frozen=True)
class Contents:
    """What the rules look at.

    Attributes:
      format: name of it.
      config: ``config.json``.
      linears: that are packed.
      scaled: weights that a scaled activation feeds.
    """

    format: str
    config: HfConfig
    linears: tuple[Linear, ...]
    scaled: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """``model_type``, or ""."""
        kind = self.config.get("model_type")
        return kind if isinstance(kind, str) else ""


def contents(source: Source) -> Contents:
    """Of an open checkpoint, from its headers."""
    linears = []
    for name in source.names():
        info = source.info(name)
        if (p := info.packed) is not None:
            module = name.removesuffix(".weight")
            shape = (info.shape[0], info.shape[-1])
            linears.append(Linear(module, shape, p.bits, p.group_size, p.symmetric, p.act_order, p.scale_dtype))
    return Contents(source.format, source.config, tuple(linears), tuple(getattr(source, "scaled_activations", ())))


def of_records(format: str, config: HfConfig, records: Sequence[Record]) -> Contents:
    """Of a checkpoint that is being written.

    Args:
      format: its name.
      config: ``config.json``.
      records: its tensors, among which scaled activations are not.
    """
    linears = [
        Linear(r.module, (r.shape[0], r.shape[-1]), r.bits, r.group_size, r.symmetric, r.act_order, r.dtype)
        for r in records
        if r.bits
    ]
    return Contents(format, config, tuple(linears))


@dataclasses.dataclass(frozen=True)
class Rule:
    """What an engine does with some checkpoints of formats that it reads.

    Attributes:
      engine: its name.
      formats: of which the rule is.
      when: the linears, or anything else nameable, that it applies to; nothing where it does not.
      says: what happens; ``{}`` for the first of them.
      stops: the engine does not serve the checkpoint.
    """

    engine: str
    formats: tuple[str, ...]
    when: Callable[[Contents], Sequence[str]]
    says: str
    stops: bool = True


def _some(test: Callable[[Linear], bool]) -> Callable[[Contents], list[str]]:
    return lambda c: [x.name for x in c.linears if test(x)]


def _family(test: Callable[[Contents], bool]) -> Callable[[Contents], list[str]]:
    return lambda c: [c.family] if c.linears and test(c) else []


def _finer(c: Contents) -> list[str]:
    """Linears whose scales bfloat16 does not hold."""
    return [x.name for x in c.linears if x.scales != "bfloat16"]


def _dtypes(config: HfConfig) -> tuple[Any, Any]:
    return config.get("dtype"), config.get("torch_dtype")


def _has_experts(c: Contents) -> bool:
    return any(MOE_CONVERTED.search(x.name) for x in c.linears)


RULES = (
    Rule(
        "vllm",
        ("gemm", "compressed-tensors", "gptq"),
        _family(lambda c: c.family in NOT_IN_VLLM),
        "does not load it packed: {}",
    ),
    Rule(
        "vllm",
        ("gptq",),
        _family(lambda c: c.family in UNJOINED),
        "does not know of {} which linears it joins, and in gptq takes them for float (AttributeError, KeyError)",
    ),
    Rule("vllm", ("gemm",), lambda c: c.scaled, "stops at the scaled activation of {} (KeyError)"),
    Rule("vllm", ("gptq",), _some(lambda x: not x.symmetric), "refuses GPTQ with zero points: {}"),
    Rule("vllm", ("gptq",), _some(lambda x: x.bits < 4), "refuses 2 and 3 bits in gptq: {}"),
    Rule("vllm", ("gptq",), _some(lambda x: x.bits == 8), "refuses 8 bits in gptq on a CPU: {}", stops=False),
    Rule("vllm", ("gptq",), _some(lambda x: x.act_order and not x.whole), "refuses act-order with groups: {}"),
    Rule("vllm", ("compressed-tensors",), _some(lambda x: x.act_order), "refuses act-order by groups: {}"),
    Rule(
        "vllm",
        ("compressed-tensors",),
        _some(lambda x: x.bits not in (4, 8)),
        "wants {} packed as a later release of compressed-tensors does (not 4 or 8 bits); that was not run",
    ),
    Rule(
        "vllm",
        ("gemm", "compressed-tensors", "gptq"),
        lambda c: _finer(c) if c.family not in NO_FLOAT16 and "bfloat16" in _dtypes(c.config) else [],
        "computes in bfloat16 by default (dtype of config.json), to which it rounds finer scales ({}): serve with "
        "--dtype float16, unless quantized with --serve-dtype bfloat16",
        stops=False,
    ),
    Rule(
        "vllm",
        ("gemm", "compressed-tensors", "gptq"),
        lambda c: _finer(c) if c.family in NO_FLOAT16 else [],
        "computes this family in bfloat16, never in float16, and rounds finer scales to it ({}), unless quantized with "
        "--serve-dtype bfloat16",
        stops=False,
    ),
    Rule(
        "transformers",
        ("float", "gemm", "compressed-tensors", "gptq", "gptq-v2"),
        lambda c: [c.family] if c.family in OWN_CODE else [],
        "does not have the family {}",
    ),
    Rule("transformers", GGUF, _family(lambda c: True), "makes it float", stops=False),
    Rule("transformers", ("gemm",), _family(_has_experts), "has no place for AWQ's tensors of single experts ({})"),
    Rule(
        "transformers",
        ("gemm", "compressed-tensors"),
        _family(lambda c: c.family == "gpt2"),
        "does not replace GPT-2's linears ({})",
    ),
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
    Rule("transformers", ("gemm", "gptq", "gptq-v2"), _family(lambda c: True), "needs GPTQModel for it", stops=False),
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
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What an engine would do with a checkpoint.

    Attributes:
      engine: its name.
      version: that the rules were observed in.
      serves: it does.
      why: what stops it, or what to know; empty if nothing.
      layers: of a tensor-parallel engine, each layer that does not divide, with what happens.
    """

    engine: str
    version: str
    serves: bool
    why: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()

    def line(self) -> str:
        """All but the layers in one line."""
        return f"{self.version}: {'yes' if self.serves else 'no'}" + "".join(f"; {w}" for w in self.why)


def verdict(engine: str, c: Contents, devices: int = 1) -> Verdict:
    """What an engine would do with a checkpoint.

    Args:
      engine: one of `VERSIONS`.
      c: see `contents`.
      devices: that share the weights of each layer (tensor parallelism).
    """
    version = VERSIONS[engine]
    if c.format not in READS[engine]:
        return Verdict(engine, version, False, (f"does not read {c.format}: {INSTEAD[engine]}",))
    found = [(r, hits) for r in RULES if r.engine == engine and c.format in r.formats and (hits := r.when(c))]
    stopping = [rule for rule in found if rule[0].stops]
    why = tuple(
        r.says.format(hits[0] + (f" and {len(hits) - 1} more" if len(hits) > 1 else ""))
        for r, hits in (stopping or found)
    )
    layers, impossible = divisions(c, devices) if engine == "vllm" else ([], False)
    return Verdict(engine, version, not stopping and not impossible, why, tuple(layers))


def divisions(c: Contents, devices: int) -> tuple[list[str], bool]:
    """Packed linears that vLLM cannot divide among devices, or not so that its Marlin kernel takes them.

    Returns:
      A line for each, and whether one of them stops the engine.
    """
    outputs: dict[str, int] = {}
    by_name = {x.name: x for x in c.linears}
    for x in c.linears:  # joined linears are one: their outputs add up
        group = next((g for g in joined_linears.JOINED for end in g if _ends(x.name, end)), ())
        stem = next((x.name.removesuffix(end) for end in group if _ends(x.name, end)), "")
        parts = [by_name[stem + end] for end in group if stem + end in by_name] or [x]
        outputs[x.name] = sum(p.shape[0] for p in parts)
    lines, stops = [], False
    for x in c.linears:
        n, k = outputs[x.name], x.shape[-1]
        row = ROW_PARALLEL.search(x.name) is not None and not HEAD.search(x.name)
        parts_of = "inputs" if row else "outputs"
        if (k if row else x.shape[0]) % devices:
            lines.append(f"{x.name}: {k if row else x.shape[0]} {parts_of} do not divide by {devices} devices")
            stops = True
            continue
        k, n = (k // devices, n) if row else (k, n // devices)
        if not x.whole and k % x.group_size:
            lines.append(f"{x.name}: {k} inputs of each device do not divide by groups of {x.group_size}")
            stops = True
        elif k % MARLIN[0] or n % MARLIN[1] or not (x.whole or x.group_size in MARLIN_GROUPS):
            what = f"{k} inputs and {n} outputs of each device in groups of {'the column' if x.whole else x.group_size}"
            lines.append(f"{x.name}: {what}, not Marlin's tiles of {MARLIN[0]} x {MARLIN[1]}: a slower kernel, or none")
    return lines, stops


def summary(c: Contents) -> str:
    """Which engines serve a checkpoint, in one line."""
    found = [verdict(engine, c) for engine in VERSIONS]
    served = [f"{v.engine} ({'; '.join(v.why)})" if v.why else v.engine for v in found if v.serves]
    return (
        ", ".join(served) or f"none of {', '.join(VERSIONS)}: {found[0].why[0] if found[0].why else found[0].layers[0]}"
    )


KINDS: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "4 bits, symmetric": {"symmetric": True},
    "8 bits, symmetric": {"bits": 8, "symmetric": True},
    "3 bits, symmetric": {"bits": 3, "symmetric": True},
    "4 bits, symmetric, act-order": {"symmetric": True, "act_order": True},
}
HELD: dict[str, tuple[str, ...]] = {
    "gemm": ("4 bits", "4 bits, symmetric"),
    "compressed-tensors": tuple(KINDS),
    "gptq": tuple(KINDS),
}


def table(formats: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows of text, the first one the head: which engine serves a Llama in which format, and packed how."""
    rows = [("format", "weights", *VERSIONS.values())]
    for format in formats:
        for kind in HELD.get(format, ("any",)):
            packed = Linear("model.layers.0.mlp.up_proj", (256, 256), 4, 128, False, False, "float16")
            packed = dataclasses.replace(packed, **KINDS.get(kind, {}))
            linears = () if format == "float" else (packed,)
            found = [verdict(e, Contents(format, {"model_type": "llama"}, linears)) for e in VERSIONS]
            rows.append((format, kind, *("yes" if v.serves else "-" for v in found)))
    return rows


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
