"""``quantization_config`` of a GPTQ checkpoint, as AutoGPTQ, GPTQModel, transformers and vLLM write and read it."""

import dataclasses
import re
from collections.abc import Collection, Sequence

from awq_jax.convert.config_json import HfConfig, JsonObject
from awq_jax.convert.format import Record
from awq_jax.convert.formats import patterns
from awq_jax.convert.formats.records import common_group, float_by_default, float_linears, packed_records
from awq_jax.errors import CheckpointError, FormatError

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"
OVERRIDES = {"bits", "group_size", "sym", "desc_act"}


@dataclasses.dataclass(frozen=True)
class GptqScheme:
    """How a module is packed: bits, group size (-1: the whole column), and what the config says of zeros and order.

    ``symmetric`` is None where it says nothing.
    """

    bits: int
    group_size: int
    symmetric: bool | None
    act_order: bool


@dataclasses.dataclass(frozen=True)
class GptqSettings:
    """What `parse` found.

    Attributes:
      base: of modules without an override.
      v1: zero points are stored less 1.
      carries: v1's zero points were made by subtracting whole words, as GPTQModel does.
      dynamic: GPTQModel's overrides, ``(pattern, scheme)``, None for a module kept float; the first
        that matches counts.
    """

    base: GptqScheme
    v1: bool
    carries: bool
    dynamic: tuple[tuple[str, GptqScheme | None], ...]

    def of(self, module: str) -> GptqScheme:
        """The scheme of a packed module.

        Raises:
          CheckpointError: if an override says that it is float.
        """
        for pattern, scheme in self.dynamic:
            if patterns.match(pattern, module):
                if scheme is None:
                    raise CheckpointError(
                        f"{module} is packed, but '-:{pattern}' in dynamic of its config says it is float; fix one"
                    )
                return scheme
        return self.base


def layout(quant: HfConfig) -> str:
    """``checkpoint_format`` (newer: ``format``) in lower case, ``"gptq"`` where it is not said."""
    return str(quant.get("checkpoint_format") or quant.get("format") or V1).lower()


def parse(config: HfConfig) -> GptqSettings:
    """Settings of a checkpoint whose ``quant_method`` is ``gptq``.

    Raises:
      FormatError: for a layout that is not GPTQ's, or values that make no sense.
    """
    quant = config["quantization_config"]
    named = {str(quant[k]).lower() for k in ("checkpoint_format", "format") if quant.get(k)}
    if quant.get("is_marlin_format"):
        named.add("marlin")
    if named - {V1, V2} or len(named) > 1:
        raise FormatError(
            f"quantization_config has the GPTQ layout {' and '.join(sorted(named))[:100]!r}; 'gptq' and 'gptq_v2' are "
            "readable. Have GPTQModel save the model in one of them"
        )
    words = str(quant.get("pack_dtype") or "int32").removeprefix("torch.")
    if words != "int32":
        raise FormatError(f"quantization_config packs into {words[:50]!r}; int32 is readable (pack_dtype)")
    known = {"bits": quant.get("bits"), "group_size": quant.get("group_size", 128)}
    held = range(2, 9) if "autoround_version" in quant else BITS
    base = _scheme("quantization_config", {**known, "sym": quant.get("sym")}, quant.get("desc_act", False), held)
    meta = quant.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, dict) else None
    writers = writers if isinstance(writers, list) else [writers]
    carries = any(str(w).lower().startswith("gptqmodel") for w in writers)
    dynamic = quant.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise FormatError(f"quantization_config: dynamic must be a table of patterns; got {str(dynamic)[:100]!r}")
    rules = tuple(_rule(base, pattern, values, held) for pattern, values in dynamic.items())
    return GptqSettings(base, layout(quant) == V1, carries, rules)


def _rule(base: GptqScheme, pattern: str, values: object, held: Collection[int]) -> tuple[str, GptqScheme | None]:
    raw = pattern[2:] if pattern[:2] in ("+:", "-:") else pattern
    if pattern.startswith("-:"):
        return raw, None
    if not isinstance(values, dict):
        raise FormatError(f"dynamic[{pattern[:100]!r}] of quantization_config is not a table")
    layouts = {str(values[k]).lower() for k in ("format", "checkpoint_format", "method") if k in values}
    if layouts - {V1, V2}:
        raise FormatError(f"dynamic[{pattern[:100]!r}] asks for {sorted(layouts)[0][:50]!r}, which is not readable")
    own = {"bits": base.bits, "group_size": base.group_size, "sym": base.symmetric, "desc_act": base.act_order}
    own.update({k: v for k, v in values.items() if k in OVERRIDES})
    return raw, _scheme(f"dynamic[{pattern[:100]!r}]", own, own["desc_act"], held)


def _scheme(where: str, values: HfConfig, act_order: object, held: Collection[int]) -> GptqScheme:
    bits, size, symmetric = values["bits"], values["group_size"], values["sym"]
    if type(bits) is not int or bits not in held:
        raise FormatError(f"{where}: bits must be 2, 3, 4 or 8 to be readable; got {bits!r:.100}")
    if type(size) is not int or not (size == -1 or size > 0):
        raise FormatError(f"{where}: group_size must be a positive integer or -1; got {size!r:.100}")
    if not isinstance(symmetric, bool | None) or not isinstance(act_order, bool):
        raise FormatError(f"{where}: sym and desc_act must be true or false; got {symmetric!r:.50}, {act_order!r:.50}")
    return GptqScheme(bits, size, symmetric, act_order)


def written(records: Sequence[Record], v1: bool) -> JsonObject:
    """The ``quantization_config`` of what was written.

    Float linears are excluded twice: by ``dynamic``, which GPTQModel and vLLM look at, and by
    ``modules_in_block_to_quantize``, which transformers and vLLM do.

    Raises:
      FormatError: if nothing is quantized, or bits or group sizes differ.
    """
    name = "gptq" if v1 else "gptq-v2"
    packed = packed_records(records, name)
    odd = next((r for r in packed if r.bits != packed[0].bits), None)
    if odd is not None:
        raise FormatError(
            f"{odd.name} has {odd.bits} bits, {packed[0].name} has {packed[0].bits}: transformers reads {name} with "
            "one number of bits only; convert to 'compressed-tensors', which can hold both"
        )
    modules = [r.module for r in packed]
    keep = sorted(m for m in float_linears(records) if not float_by_default(m))
    quant: JsonObject = {
        "quant_method": "gptq",
        "bits": packed[0].bits,
        "group_size": common_group(packed, name),
        "desc_act": any(r.act_order for r in packed),
        "sym": all(r.symmetric for r in packed),
        "lm_head": False,
        "checkpoint_format": V1 if v1 else V2,
        "format": V1 if v1 else V2,
        "pack_dtype": "int32",
    }
    if keep:
        quant["dynamic"] = {f"-:^{re.escape(m)}$": {} for m in keep}
        quant["modules_in_block_to_quantize"] = [_endings(modules, keep)]
    return quant


def _endings(modules: Sequence[str], keep: Sequence[str]) -> list[str]:
    """What tells packed from float modules in every block: names within it, or whole names if blocks differ.

    transformers looks for an entry at the end of a module's name, vLLM anywhere in it.
    """
    inside = sorted({re.sub(r"^.*?\.\d+\.", "", m) for m in modules})
    return inside if not any(entry in m for entry in inside for m in keep) else sorted(modules)
