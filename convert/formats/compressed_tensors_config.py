"""``quantization_config`` of a compressed-tensors checkpoint: which module is packed, and how.

The fields are those of ``QuantizationConfig`` and ``QuantizationArgs`` of compressed-tensors 0.9 to 0.20.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from awq_jax.convert.config_json import HfConfig, JsonObject
from awq_jax.convert.format import Record
from awq_jax.convert.formats import joined_linears, patterns
from awq_jax.convert.formats.records import HEAD, float_linears, float_towers, packed_records
from awq_jax.errors import CheckpointError, FormatError

QUANT_METHOD = "compressed-tensors"
PACKED = "pack-quantized"
VERSION = "0.18.0"  # the first release that packs every number of bits as one stream of bits
PRESET = re.compile(r"W([2-8])A16(_ASYM)?", re.IGNORECASE)
REMEDY = "; dequantize it with the tool that wrote it, and convert the float checkpoint"
MEANT = {"num_bits", "type", "symmetric", "group_size", "strategy", "dynamic", "actorder"}
UNUSED = {"block_structure", "scale_dtype", "zp_dtype", "observer", "observer_kwargs"}  # once it is packed
ROUTER = "block_sparse_moe.gate"
EMBEDDINGS = re.compile(r"(^|\.)(embed(?!_out)\w*|wte|wpe)$")


@dataclasses.dataclass(frozen=True)
class CompressedScheme:
    """How the modules of one config group are packed.

    Attributes:
      bits: 2 to 8.
      symmetric: without zero points.
      strategy: ``"group"``, ``"channel"`` or ``"tensor"``.
      group_size: of strategy ``"group"``, else 0.
      act_order: channels are assigned to groups by ``weight_g_idx``.
    """

    bits: int
    symmetric: bool
    strategy: str
    group_size: int
    act_order: bool


@dataclasses.dataclass(frozen=True)
class CompressedSettings:
    """What `parse` found.

    Attributes:
      groups: ``(targets, scheme)`` in the order of the config.
      ignore: names and patterns of modules that are not packed.
      spaced: where a shape fits both, words hold ``32 // bits`` whole codes each (before 0.18), not a
        stream of bits.
    """

    groups: tuple[tuple[tuple[str, ...], CompressedScheme], ...]
    ignore: tuple[str, ...]
    spaced: bool

    def of(self, module: str) -> CompressedScheme:
        """The scheme of a packed module: a target that names it, else one whose pattern matches, else its class.

        Raises:
          CheckpointError: if it is to be ignored, or not targeted.
        """
        hit = next((i for i in self.ignore if _matches(i, module)), None)
        if hit is not None:
            raise CheckpointError(f"{module} is packed, but {hit!r} in ignore of config.json says it is not; fix one")
        schemes = {scheme for _, scheme in self.groups}
        if len(schemes) == 1:
            return schemes.pop()
        for matches in (str.__eq__, _matches):
            for targets, scheme in self.groups:
                if any(matches(t, module) for t in targets):
                    return scheme
        linear = next((s for targets, s in self.groups if "Linear" in targets), None)
        if linear is None:
            raise CheckpointError(f"{module} is packed, but no target of config.json matches it; add it to one")
        return linear


def entry(config: HfConfig) -> JsonObject | None:
    """The quantization's part of ``config.json`` (under its old name, too), or None."""
    return config.get("quantization_config", config.get("compression_config"))


def parse(config: HfConfig) -> CompressedSettings:
    """Settings of a checkpoint in the packed format.

    Raises:
      FormatError: if it is in another of the library's formats, or does what packed weights alone do
        not say: quantized activations or caches, sparsity, transforms.
    """
    quant = entry(config)
    assert quant is not None
    for key in ("sparsity_config", "transform_config"):
        value = quant.get(key)
        absent = not value or (isinstance(value, dict) and not value.get("config_groups") and _dense(value))
        if not absent:
            raise FormatError(f"quantization_config has a {key}, which is not readable{REMEDY}")
    found = _config_groups(quant)
    groups = [_group(str(name)[:100], value, quant.get("format")) for name, value in found.items()]
    live = tuple((targets, scheme) for targets, scheme in groups if scheme is not None)
    if not live:
        raise FormatError("quantization_config quantizes no weights")
    ignore = _strings("ignore", quant.get("ignore") or [])
    return CompressedSettings(live, ignore, _before_streams(quant.get("version")))


def _config_groups(quant: HfConfig) -> JsonObject:
    if quant.get("kv_cache_scheme") is not None:
        raise FormatError(f"quantization_config has a kv_cache_scheme: a quantized cache is not readable{REMEDY}")
    found = quant.get("config_groups")
    if not isinstance(found, dict) or not found:
        raise FormatError(f"quantization_config has no config_groups; it has {str(found)[:100]!r}")
    return found


def refuse_activations(config: HfConfig) -> None:
    """Refuse a checkpoint whose activations or caches are quantized, whatever its weights are.

    Raises:
      FormatError: saying which.
    """
    for name, group in _config_groups(entry(config) or {}).items():
        _refuse_activations(f"config group {str(name)[:100]!r} of quantization_config", group)


def _refuse_activations(where: str, group: object) -> None:
    for key in ("input_activations", "output_activations"):
        if isinstance(group, dict) and group.get(key) is not None:
            raise FormatError(f"{where} quantizes activations ({key}), which is not readable{REMEDY}")


def _group(name: str, value: object, default: object) -> tuple[tuple[str, ...], CompressedScheme | None]:
    where = f"config group {name!r} of quantization_config"
    if isinstance(value, list):  # a preset: its name, and what it applies to
        preset = PRESET.fullmatch(name)
        if preset is None or (preset[2] and preset[1] != "4"):
            raise FormatError(f"{where} is a preset that is not readable; known are W2A16 to W8A16 and W4A16_ASYM")
        value = {"targets": value, "weights": _weights(int(preset[1]), not preset[2], 128, False)}
    if not isinstance(value, dict):
        raise FormatError(f"{where} is not a table")
    targets = _strings(f"targets of {where}", value.get("targets"))
    _refuse_activations(where, value)
    weights = value.get("weights")
    if weights is None:
        return targets, None
    format = value.get("format") or default
    if format != PACKED:
        raise FormatError(f"{where} has format {str(format)[:100]!r}; of this library's, {PACKED!r} is readable")
    if not isinstance(weights, dict):
        raise FormatError(f"weights of {where} are not a table")
    return targets, _scheme(where, weights)


def _scheme(where: str, weights: HfConfig) -> CompressedScheme:
    unknown = sorted(set(weights) - MEANT - UNUSED)
    if unknown:
        raise FormatError(f"weights of {where} have the unknown entry {unknown[0][:100]!r}")
    bits, symmetric = weights.get("num_bits", 8), weights.get("symmetric", True)
    kind, dynamic = weights.get("type", "int"), weights.get("dynamic", False)
    size, strategy, order = weights.get("group_size"), weights.get("strategy"), weights.get("actorder")
    if type(bits) is not int or not 2 <= bits <= 8:
        raise FormatError(f"num_bits of {where} must be 2 to 8; got {bits!r:.100}")
    if kind != "int" or dynamic is not False or not isinstance(symmetric, bool):
        raise FormatError(
            f"weights of {where} must be static integers (type 'int', dynamic false, symmetric true or false); got "
            f"{kind!r:.50}, {dynamic!r:.50} and {symmetric!r:.50}"
        )
    if size is not None and (type(size) is not int or not (size == -1 or size > 0)):
        raise FormatError(f"group_size of {where} must be a positive integer, -1 or null; got {size!r:.100}")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy not in ("group", "channel", "tensor") or (strategy == "group") != (size is not None and size > 0):
        raise FormatError(
            f"{where} has strategy {strategy!r:.50} with group_size {size!r:.50}; readable are 'group' with a size and "
            "'channel' and 'tensor' without"
        )
    if order not in (None, True, False, "group", "dynamic", "weight", "static"):
        raise FormatError(f"actorder of {where} must be null, 'group' or 'weight'; got {order!r:.100}")
    by_index = strategy == "group" and order in (True, "group", "dynamic")
    return CompressedScheme(bits, symmetric, strategy, 0 if size is None or size < 0 else size, by_index)


def _matches(target: str, module: str) -> bool:
    return patterns.match(target[3:], module) if target.startswith("re:") else target == module


def _strings(what: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise FormatError(f"{what} must be a list of names; got {str(value)[:100]!r}")
    return tuple(value)


def _dense(value: HfConfig) -> bool:
    return set(value) <= {"config_groups"} or value.get("format") == "dense"


def _before_streams(version: object) -> bool:
    numbers = re.match(r"(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < (0, 18)


def written(records: Sequence[Record]) -> JsonObject:
    """The ``quantization_config`` that vLLM, transformers and compressed-tensors itself expect.

    One way of packing: it targets the class ``Linear``, and a packed head by name, whose class is another in
    vLLM; the float modules are listed. Several: each targets its modules by name, as vLLM would take the class for its
    fused modules before any name; a layer's experts by a pattern, as vLLM has its own names for them and transformers
    looks for one.

    Raises:
      FormatError: if nothing is packed.
    """
    schemes: dict[CompressedScheme, list[str]] = {}
    packed = packed_records(records, QUANT_METHOD)
    sizes = {r.group_size for r in packed if r.group_size < r.shape[-1]}
    for r in packed:
        whole = r.group_size == r.shape[-1] and r.group_size not in sizes
        strategy, size = ("channel", 0) if whole else ("group", r.group_size)
        schemes.setdefault(CompressedScheme(r.bits, r.symmetric, strategy, size, r.act_order), []).append(r.module)
    groups = {
        f"group_{i}": {
            "targets": _targets(modules, schemes) if len(schemes) > 1 else ["Linear", *filter(HEAD.search, modules)],
            "weights": _weights(s.bits, s.symmetric, s.group_size, s.act_order),
            "input_activations": None,
            "output_activations": None,
            "format": PACKED,
        }
        for i, (s, modules) in enumerate(schemes.items())
    }
    return {
        "quant_method": QUANT_METHOD,
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _ignored(records),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _targets(modules: list[str], schemes: Mapping[CompressedScheme, list[str]]) -> list[str]:
    """Names of modules, with one pattern for each layer whose packed experts are all among them."""
    layers = {m: match["layer"] for m in modules if (match := joined_linears.EXPERT.fullmatch(m))}
    others = (match for found in schemes.values() if found is not modules for m in found
              if (match := joined_linears.EXPERT.fullmatch(m)))  # fmt: skip
    whole = set(layers.values()) - {match["layer"] for match in others}
    short = {m: joined_linears.experts_pattern(layer) for m, layer in layers.items() if layer in whole}
    return list(dict.fromkeys(short.get(m, m) for m in modules))


def _ignored(records: Sequence[Record]) -> list[str]:
    """Float linears, and the head unless it is packed: a tied checkpoint does not store it."""
    names = [n for n in float_linears(records) if not EMBEDDINGS.search(n)]
    experts = map(joined_linears.experts_pattern, joined_linears.float_experts(records))
    # PhiMoE's router is a linear under this name in transformers 5, which renames what it reads.
    routers = [n.removesuffix(ROUTER) + "mlp.router" for n in names if n.endswith(ROUTER)]
    packed = [r.module for r in records if r.bits]
    head = [] if any(HEAD.search(m) for m in packed) else ["lm_head"]
    towers = [f"re:(.*[.])?{re.escape(root)}[.].+" for root in float_towers(names, packed)]
    return sorted({*head, *experts, *names, *routers, *towers})


def _weights(bits: int, symmetric: bool, group_size: int, act_order: bool) -> JsonObject:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size or None,
        "actorder": "group" if act_order else None,
        "block_structure": None,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
    }
