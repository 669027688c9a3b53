"""MLX's affine layout (mlx-lm): words along the inputs, a scale and a bias per group.

Per module ``m`` of K inputs and N outputs, ``b`` bits, groups of ``g``: ``m.weight`` uint32
``[N, K*b/32]``, ``m.scales`` and ``m.biases`` float ``[N, K/g]``; ``w = q * scale + bias``. Codes fill
the words of a row from the lowest bit up, also with 3, 5 and 6 bits, where they straddle words: the
canonical order, transposed. About half of the scales that MLX itself makes are negative. Embeddings
and the head may be packed as well.

``config.json`` has ``quantization: {group_size, bits, mode, <module>: {...} | false}`` (and the same
under ``quantization_config``); an entry by a module's name replaces the defaults for it.

mlx-lm keeps the experts of a layer stacked, ``mlp.switch_mlp.up_proj.weight`` ``[E, N, K*b/32]``; they
are read one by one under the names that Hugging Face gives them.
"""

import collections
import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from awq_jax.convert.arrays import linear
from awq_jax.convert.arrays.fitting import cast_scales, check_integer, with_offsets
from awq_jax.convert.arrays.rearrange import regroup, transposed
from awq_jax.convert.config_json import HfConfig, JsonObject
from awq_jax.convert.files.safetensors import Entry, SafetensorsDir
from awq_jax.convert.format import BaseEncoder, Example, Format, Record, Stored, named, quant_method
from awq_jax.convert.formats.records import packed_records
from awq_jax.convert.source import Packed, PackedSource
from awq_jax.dtypes import FLOATS
from awq_jax.errors import CheckpointError, FormatError
from awq_jax.qtensor import QuantizedTensor

BITS = (2, 3, 4, 5, 6, 8)  # MLX also has 1, which the canonical form has not
GROUPS = (32, 64, 128)
DEFAULTS = {"group_size": 64, "bits": 4, "mode": "affine"}  # of MLX, where an entry does not say
EXPERT = re.compile(r"\.experts\.\d+\.")
STACKERS = ("mixtral", "qwen2_moe", "deepseek_v2")  # whose experts mlx-lm stacks itself, also packed ones
TRANSPOSED = ("gpt2",)  # whose linears mlx-lm turns round, packed or not
STACK = re.compile(r"(?P<mlp>.*\.(mlp|block_sparse_moe))\.switch_mlp\.(?P<which>gate|up|down)_proj\.(?P<part>\w+)")
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
MAX_EXPERTS = 4096


def settings(config: HfConfig) -> tuple[JsonObject, JsonObject]:
    """The default settings, and the modules that have their own (settings, or False for float).

    Raises:
      FormatError: an unknown entry, or a value out of range.
    """
    quant = config.get("quantization", config.get("quantization_config"))
    if not isinstance(quant, Mapping):
        raise FormatError("config.json: quantization must be an object with group_size and bits")
    default = _checked("quantization", {k: v for k, v in quant.items() if k in DEFAULTS})
    modules: JsonObject = {}
    for name, value in quant.items():
        if name in DEFAULTS or value is True:
            continue
        if value is False:
            modules[name] = False
        elif isinstance(value, Mapping):
            modules[name] = _checked(f"quantization.{name}", value)
        else:
            raise FormatError(f"config.json: quantization.{name} is {value!r:.80}, not settings of a module or false")
    return default, modules


def _checked(where: str, given: HfConfig) -> JsonObject:
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
        raise FormatError(
            f"config.json: {where} has {unknown[0]!r}, which is not known; known are {', '.join(DEFAULTS)}"
        )
    out = DEFAULTS | {key: value for key, value in given.items() if value is not None}  # null: MLX's default
    if out["mode"] != "affine":
        raise FormatError(f"config.json: {where} has mode {out['mode']!r:.80}; of MLX's modes 'affine' is readable")
    for key, allowed in (("bits", BITS), ("group_size", GROUPS)):
        if type(out[key]) is not int or out[key] not in allowed:
            raise FormatError(f"config.json: {where}.{key} is {out[key]!r:.80}; it must be one of {allowed}")
    return out


class MlxFiles(SafetensorsDir):
    """The files of a checkpoint, with one entry per expert for each that is a stack of them.

    Attributes:
      stack_of: module of an expert to the module of its stack.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.stack_of: dict[str, str] = {}
        for name, entry in list(self.entries.items()):
            match = STACK.fullmatch(name)
            if not match or len(entry.shape) < 2 or 0 in entry.shape or entry.shape[0] > MAX_EXPERTS:
                continue
            del self.entries[name]
            count, *shape = entry.shape
            nbytes = entry.nbytes // count
            which = match["which"]
            for e in range(count):
                last = MIXTRAL[which] if match["mlp"].endswith("block_sparse_moe") else f"{which}_proj"
                module = f"{match['mlp']}.experts.{e}.{last}"
                one = dataclasses.replace(entry, shape=tuple(shape), offset=entry.offset + e * nbytes, nbytes=nbytes)
                if f"{module}.{match['part']}" in self.entries:
                    raise CheckpointError(f"{directory} holds {module}.{match['part']} twice, alone and in {name}")
                self.entries[f"{module}.{match['part']}"] = one
                self.stack_of[module] = name.rpartition(".")[0]


class MlxSource(PackedSource):
    """Reader; see the module.

    Raises:
      FormatError: another mode than affine, or settings that are not known.
      CheckpointError: a module's tensors do not fit each other or the config.
    """

    format = "mlx"
    required = ("scales", "biases", "weight")
    roles = dict.fromkeys(required, "nk")
    container = MlxFiles
    files: MlxFiles

    def __init__(self, directory: Path, config: JsonObject) -> None:
        self.default, self.modules = settings(config)
        super().__init__(directory, config)
        there = {module for module, _ in self.packed.values()}
        there |= {stack for module, stack in self.files.stack_of.items() if module in there}
        missing = sorted(m for m, s in self.modules.items() if s and m not in there)
        if missing:
            raise CheckpointError(
                f"{directory}: config.json says that {missing[0]} is quantized, but {missing[0]}.scales is not there"
            )

    def describe(self, module: str, entries: Mapping[str, Entry]) -> tuple[tuple[int, int], Packed]:
        w, s, b = (entries[p] for p in ("weight", "scales", "biases"))
        chosen = self.modules.get(self.files.stack_of.get(module, module), self.default)
        if not chosen:
            raise CheckpointError(f"{module} is quantized, but config.json says it is not")
        bits, group = chosen["bits"], chosen["group_size"]
        if len(w.shape) == 3:
            raise FormatError(
                f"{module}.weight is a stack of {w.shape[0]} matrices, of which those of switch_mlp "
                "are readable; convert the float checkpoint it was made from"
            )
        if (
            len(w.shape) != 2
            or 0 in (*w.shape, *s.shape)
            or s.shape != (w.shape[0], w.shape[1] * 32 // (bits * group))
            or w.shape[1] * 32 != s.shape[-1] * group * bits
            or b.shape != s.shape
        ):
            raise CheckpointError(
                f"{module} has weight {w.shape}, scales {s.shape} and biases {b.shape}, which do not "
                f"fit each other with {bits} bits in groups of {group}, as config.json says"
            )
        if w.dtype != np.uint32 or s.dtype.name not in FLOATS or b.dtype.name not in FLOATS:
            raise CheckpointError(
                f"{module} has dtypes {w.dtype}, {s.dtype}, {b.dtype}; MLX has uint32 and two floating-point types"
            )
        shape = w.shape[0], s.shape[1] * group
        return shape, Packed(bits, group, False, s.dtype.name, offsets=True)

    def decode(
        self, module: str, arrays: Mapping[str, np.ndarray], shape: tuple[int, int], packed: Packed
    ) -> QuantizedTensor:
        qweight, scales, offsets = (transposed(arrays[p]) for p in ("weight", "scales", "biases"))
        n, k = shape
        return linear.build(qweight, scales, None, packed.bits, packed.group_size, k, n, "float32", offsets=offsets)


class MlxEncoder(BaseEncoder):
    """Writer; see `awq_jax.convert.format.Encoder`. Scales and biases have ``target.dtype``, if that is given."""

    def fit(self, name: str, q: QuantizedTensor) -> QuantizedTensor | None:
        kind = self.destination.config.get("model_type")
        if EXPERT.search(name) and kind not in STACKERS:
            raise FormatError(f"{name} is one of several experts, which mlx-lm wants stacked; save as 'awq-jax'")
        if kind in TRANSPOSED:
            raise FormatError(f"{name} is stored transposed in {kind}, and mlx-lm would turn it; save as 'awq-jax'")
        check_integer(name, q, bits=BITS, format="mlx")
        size = next((g for g in reversed(GROUPS) if q.group_size % g == 0), None)
        if size is None:
            raise FormatError(
                f"{name} has group size {q.group_size}, mlx holds {', '.join(map(str, GROUPS))}; quantize with one of "
                "those, or save as 'awq-jax'"
            )
        dtype = self._dtype(q)
        return regroup(with_offsets(cast_scales(q, dtype), dtype), size)

    def encode(self, name: str, q: QuantizedTensor) -> Stored:
        dtype = self._dtype(q)
        scales, biases = (transposed(np.asarray(a).astype(dtype, copy=False)) for a in (q.scales, q.offsets))
        return named(name, weight=transposed(np.asarray(q.qweight)), scales=scales, biases=biases), {}

    def _dtype(self, q: QuantizedTensor) -> np.dtype:
        """Of scales and biases: MLX has one for both."""
        if self.destination.dtype:
            return FLOATS[self.destination.dtype]
        scales = np.asarray(q.scales).dtype
        return scales if q.offsets is None else np.promote_types(scales, np.asarray(q.offsets).dtype)

    def config(self, records: Sequence[Record]) -> JsonObject:
        """``quantization`` as mlx-lm reads it: the commonest settings, and by name the modules that differ.

        Raises:
          FormatError: if nothing is quantized, or experts differ.
        """
        packed = packed_records(records, "mlx")
        common = collections.Counter((r.group_size, r.bits) for r in packed).most_common(1)[0][0]
        quant: JsonObject = _entry(*common)
        experts = [r for r in records if EXPERT.search(r.name) and len(r.shape) == 2]
        odd = next((r for r in experts if (r.group_size, r.bits) != common), None)
        if odd is not None and any(r.bits for r in experts):
            raise FormatError(
                f"{odd.name} is not quantized like most of the model, which mlx-lm expects of experts that are packed; "
                "save as 'awq-jax'"
            )
        for r in records:
            if r.bits and (r.group_size, r.bits) != common:
                quant[r.module] = _entry(r.group_size, r.bits)
            elif not r.bits and len(r.shape) == 2 and r.module != r.name and r not in experts:
                quant[r.module] = False
        return {"quantization": quant, "quantization_config": quant}


def _entry(group_size: int, bits: int) -> JsonObject:
    return {"group_size": group_size, "bits": bits, "mode": "affine"}


def _matches(config: HfConfig, names: Collection[str]) -> bool:
    bare = config.get("quantization_config")
    named = isinstance(bare, dict) and "bits" in bare and "group_size" in bare
    named = named and any(n.endswith(".biases") for n in names)
    return not quant_method(config) and ("quantization" in config or named)


FORMAT = Format(
    name="mlx",
    title="MLX affine: mlx-lm",
    holds="2, 3, 4, 5, 6 and 8 bits per module, groups of 32, 64 and 128, scales of either sign and offsets; whole "
    "zero points exactly with --dtype float32",
    matches=_matches,
    reader=MlxSource,
    encoder=MlxEncoder,
    example=Example("edges", group_size=64, scale_dtype="bfloat16"),
)
