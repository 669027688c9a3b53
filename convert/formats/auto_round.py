"""AutoRound's ``quantization_config``, as that of the layout its tensors are in: GPTQ's or AWQ's.

``packing_format`` says which: ``auto_round:auto_gptq`` is GPTQ's v1 (symmetric weights, by default), ``auto_round`` and
``auto_round:gptqmodel`` its v2, ``auto_round:auto_awq`` AWQ's gemm; here also with 5, 6 and 7 bits. The scale of a
symmetric group may be negative: the value that is furthest from 0 has the code -2**(bits-1). ``extra_config`` has
settings of modules by name, or by a pattern that is searched for in names, 16 bits meaning float.
"""

import re

from awq_jax.convert.config_json import HfConfig, JsonObject
from awq_jax.convert.format import quant_method
from awq_jax.errors import FormatError

METHODS = ("auto-round", "auto_round", "autoround", "intel/auto-round")
LAYOUTS = {"auto_gptq": "gptq", "gptq": "gptq", "gptqmodel": "gptq_v2", "auto_awq": "gemm", "awq": "gemm"}
KERNELS = ("", "exllamav2", "triton", "tritonv2", "torch")  # after the layout: what it once ran on
LITERAL = re.compile(r"[\w.\-]+")


def translated(config: JsonObject) -> JsonObject:
    """``config`` with the settings of the layout, if it is AutoRound's; else itself.

    Raises:
      FormatError: another data type or layout, or activations that are quantized.
    """
    if quant_method(config) not in METHODS:
        return config
    quant = config["quantization_config"]
    layout = _layout(str(quant.get("packing_format") or "auto_round:auto_gptq").lower())
    kind, activations = str(quant.get("data_type") or "int"), quant.get("act_bits")
    if not kind.startswith("int") or (activations is not None and activations != 16):
        raise FormatError(
            f"quantization_config of AutoRound has data_type {kind[:50]!r} and act_bits {activations!r:.50}; integer "
            "weights with float activations are readable"
        )
    if quant.get("rotation_config"):
        raise FormatError("quantization_config of AutoRound has a rotation_config, which is not readable")
    extra = quant.get("extra_config") or {}
    if not isinstance(extra, dict):
        raise FormatError(f"quantization_config: extra_config must be a table of modules; got {str(extra)[:100]!r}")
    kept = {k: quant.get(k) for k in ("bits", "group_size", "sym") if k in quant}
    new = kept | {"autoround_version": quant.get("autoround_version") or "unknown"}
    new |= {"dynamic": dict(_rule(name, values) for name, values in sorted(extra.items(), key=_names_first))}
    if layout == "gemm":
        new |= {"quant_method": "awq", "version": "gemm"}
    else:
        new |= {"quant_method": "gptq", "checkpoint_format": layout, "desc_act": False}
    return {**config, "quantization_config": new}


def _layout(packing: str) -> str:
    first, *rest = packing.split(":")
    known = next((LAYOUTS[r] for r in rest if r in LAYOUTS), LAYOUTS.get(first))
    others = [r for r in rest if r not in LAYOUTS]
    if first not in ("auto_round", "autoround", *LAYOUTS) or any(r not in KERNELS for r in others):
        raise FormatError(
            f"quantization_config of AutoRound has packing_format {packing[:80]!r}; readable are auto_round, "
            "auto_round:auto_gptq, auto_round:gptqmodel and auto_round:auto_awq"
        )
    return known or "gptq_v2"


def _names_first(item: tuple[str, object]) -> bool:
    return LITERAL.fullmatch(item[0]) is None


def _rule(name: str, values: object) -> tuple[str, HfConfig]:
    """An entry of GPTQModel's ``dynamic``, whose patterns are matched from the beginning of a name."""
    if not isinstance(values, dict):
        raise FormatError(f"extra_config[{name[:100]!r}] of quantization_config is not a table")
    pattern = (
        f"^{re.escape(name)}$" if LITERAL.fullmatch(name) else name if name.startswith(("^", ".*")) else f".*{name}"
    )
    bits = values.get("bits")
    if type(bits) is int and bits >= 16:
        return f"-:{pattern}", {}
    return f"+:{pattern}", {k: v for k in ("bits", "group_size", "sym") if (v := values.get(k)) is not None}
