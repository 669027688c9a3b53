"""What the AWQ layouts of AutoAWQ, GPTQModel and llm-awq share: settings, checks, config.json."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from awq_jax.convert.arrays import linear
from awq_jax.convert.arrays.fitting import cast_scales, check_integer, integer_zeros
from awq_jax.convert.arrays.rearrange import regroup
from awq_jax.convert.config_json import HfConfig, JsonObject
from awq_jax.convert.files import slices
from awq_jax.convert.files.safetensors import Entry
from awq_jax.convert.format import BaseEncoder, Record, named, quant_method
from awq_jax.convert.formats.awq import scaled_activations
from awq_jax.convert.formats.records import common_group, float_by_default, float_modules, packed_records
from awq_jax.convert.source import Info, Packed, PackedSource
from awq_jax.dtypes import FLOATS
from awq_jax.errors import CheckpointError, FormatError
from awq_jax.qtensor import QuantizedTensor

# Names of kernels that run on the gemm layout.
KERNELS = {"exllama": "gemm", "exllamav2": "gemm", "ipex": "gemm"}


def is_version(config: HfConfig, *versions: str) -> bool:
    """Whether ``quant_method`` is ``awq`` and the layout one of these."""
    return quant_method(config) == "awq" and version(config["quantization_config"]) in versions


def version(quant: HfConfig) -> str:
    """The layout that a ``quantization_config`` names, in lower case."""
    name = quant.get("version") or quant.get("checkpoint_format") or quant.get("format") or "gemm"
    return KERNELS.get(str(name).lower(), str(name).lower())


def settings(quant: HfConfig, format: str, words: str = "int32") -> tuple[int, bool]:
    """``(group_size, zero_point)`` of a ``quantization_config``.

    Args:
      quant: the entry.
      format: for messages.
      words: what the codes are stored in, if GPTQModel says so.

    Raises:
      FormatError: a value is out of range, or says something that this library does not read.
    """
    bits = quant.get("bits", quant.get("w_bit", 4))
    if type(bits) is not int or bits != 4:
        raise FormatError(f"quantization_config: the {format} layout is 4-bit; bits is {bits!r:.80}")
    group = quant.get("group_size", quant.get("q_group_size", 128))
    zero_point = quant.get("zero_point", not quant.get("sym", False))
    if type(group) is not int or not (group == -1 or group > 0) or not isinstance(zero_point, bool):
        raise FormatError(
            f"quantization_config: group_size must be a positive integer or -1 and zero_point true or false; "
            f"got {group!r:.80} and {zero_point!r:.80}"
        )
    if quant.get("pack_dtype") not in (None, words):
        raise FormatError(
            f"quantization_config: pack_dtype is {quant['pack_dtype']!r:.80}; the {format} layout is read in {words}"
        )
    return group, zero_point


def zeros_width(k: int, group: int) -> int | None:
    """W: int32 words that hold the zero points of a column in gemv and its kin (AutoAWQ), or None if undefined."""
    multiple = 1 if group >= 128 else {64: 2, 32: 4}.get(group)
    if multiple is None:
        return None
    words = math.ceil(k // group / 8)
    return math.ceil(words / multiple) * multiple


class AwqSource(PackedSource):
    """Reader of a layout.

    Attributes:
      group_size, zero_point: of ``config.json``.
      layer_groups: GPTQModel's per-module settings are present, so that other group sizes may occur.

    Raises:
      FormatError: settings that are not read.
      CheckpointError: if a linear's tensors are incomplete or do not fit each other.
    """

    words: ClassVar[str] = "int32"

    def __init__(self, directory: Path, config: JsonObject) -> None:
        quant = config["quantization_config"]
        self.group_size, self.zero_point = settings(quant, self.format, self.words)
        self.layer_groups = bool(quant.get("dynamic"))
        self._symmetric: set[str] = set()  # tensors of zero points that were looked at
        super().__init__(directory, config)
        self._activations = scaled_activations.scales_by_weight(self)
        hidden = set(self._activations.values())
        self._names = [n for n in super().names() if n not in hidden]

    @property
    def scaled_activations(self) -> list[str]:
        """The packed weights that a scaled activation feeds."""
        return list(self._activations)

    def read(self, name: str) -> slices.Tensor:
        value = super().read(name)
        if isinstance(value, QuantizedTensor) and name in self._activations:
            return scaled_activations.with_inv_scale(value, self._activations[name], self.files)
        return value

    def read_slice(self, name: str, index: slices.Index) -> slices.Tensor | None:
        return None if name in self._activations else super().read_slice(name, index)

    def info(self, name: str) -> Info:
        if name not in self.packed and name in self._activations.values():
            raise CheckpointError(f"no tensor {name!r} in {self.directory}: it is part of a packed weight")
        return super().info(name)

    def _refuse_stray(self, rest: set[str]) -> None:
        super()._refuse_stray({n for n in rest if not scaled_activations.STORED.fullmatch(n)})

    def middle_only(self, part: str, unpack: Callable[[np.ndarray], np.ndarray]) -> None:
        """Refuse a tensor of zero points that are not 8, where ``config.json`` says that there are none.

        Args:
          part: its name; all of it is read, once, whatever block is decoded.
          unpack: the zero points that it holds, uint8.

        Raises:
          FormatError: naming it.
        """
        if part not in self._symmetric:
            linear.check_symmetric(unpack(self.files.read(part)), 4, part, "zero_point false")
            self._symmetric.add(part)

    def misfit(self, module: str, entries: Mapping[str, Entry]) -> CheckpointError:
        """What to raise where shapes do not go together."""
        shapes = ", ".join(f"{part} {entry.shape}" for part, entry in entries.items())
        return CheckpointError(
            f"{module} has {shapes}, which do not fit each other or the group size "
            f"{self.group_size} of config.json in the {self.format} layout"
        )

    def check_types(
        self, module: str, entries: Mapping[str, Entry], integers: Mapping[str, str], floats: Sequence[str]
    ) -> None:
        """Check dtypes and that all are matrices with entries.

        Raises:
          CheckpointError: naming the module.
        """
        for part, entry in entries.items():
            if len(entry.shape) != 2 or 0 in entry.shape:
                raise CheckpointError(f"{module}.{part} has shape {entry.shape}; it must be a matrix")
        wrong = any(entries[p].dtype.name != t for p, t in integers.items())
        if wrong or any(entries[p].dtype.name not in FLOATS for p in floats):
            found = ", ".join(str(e.dtype) for e in entries.values())
            wanted = ", ".join(integers.get(p, "a floating-point type") for p in entries)
            raise CheckpointError(f"{module} has dtypes {found}; the {self.format} layout has {wanted}")

    def groups(self, k: int, stored: int | None = None) -> int | None:
        """Groups of a column of K inputs, or None if they do not divide it.

        Args:
          k: K.
          stored: their number where it can be read off a shape.
        """
        expected = k // self.group_size if self.group_size > 0 else 1
        if stored is not None and self.layer_groups:
            expected = stored
        if expected < 1 or k % expected or (stored is not None and stored != expected):
            return None
        return None if not self.layer_groups and self.group_size > 0 and expected * self.group_size != k else expected


class AwqEncoder(BaseEncoder):
    """Writer of a layout; see `awq_jax.convert.format.Encoder`."""

    version: ClassVar[str]
    multiples: ClassVar[tuple[int, int]] = (1, 8)  # that inputs and outputs must be of
    scale_ones: ClassVar[bool] = True  # scaled activations are stored where nothing is scaled, too
    padded_groups: ClassVar[bool] = False  # the width of the zeros is only defined for some group sizes

    def fit(self, name: str, q: QuantizedTensor) -> QuantizedTensor | None:
        if float_by_default(name):
            return None
        scaled_activations.check(name, q, self._activation(name), self.version)
        fitted = scaled_activations.rounded(q, self._activation(name))
        check_integer(name, scaled_activations.without_inv_scale(fitted), bits=(4,), columns=8, format=self.version)
        if self.padded_groups and zeros_width(q.k, q.group_size) is None:
            if q.group_size % 32:
                raise FormatError(
                    f"{name} has groups of {q.group_size}, {self.version} has groups of 32, 64 or at least 128; "
                    "convert to 'gemm', or quantize with group_size=128"
                )
            fitted = regroup(fitted, 32)
        rows, columns = self.multiples
        if q.k % rows or q.n % columns:
            raise FormatError(
                f"{name} has {q.k} inputs and {q.n} outputs, {self.version} needs multiples of {rows} and {columns}; "
                "convert to 'gemm'"
            )
        return self.values(name, fitted)

    def values(self, name: str, q: QuantizedTensor) -> QuantizedTensor:
        """Whole zero points and float16 scales."""
        return cast_scales(integer_zeros(q))

    def config(self, records: Sequence[Record]) -> JsonObject:
        """The ``quantization_config`` that AutoAWQ, transformers and vLLM expect.

        Raises:
          FormatError: if nothing is quantized, the group sizes differ, or a float module cannot be
            excluded by name.
        """
        packed = packed_records(records, self.version)
        quant = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": common_group(packed, self.version),
            "zero_point": not all(r.symmetric for r in packed),
            "version": self.version,
            "modules_to_not_convert": float_modules(records, self.version) or None,
        }
        return {"quantization_config": quant}

    def stored(self, name: str, q: QuantizedTensor, **parts: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of a module by their full names, with the scale of the activation that feeds it."""
        return named(name, **parts) | scaled_activations.stored(q, self._activation(name), self.scale_ones)

    def _activation(self, name: str) -> str | None:
        return scaled_activations.scales_name(name, self.destination.config)


def whole_zeros(q: QuantizedTensor) -> np.ndarray:
    """uint8 ``[K/g, N]``; 8 everywhere if the weight is symmetric."""
    return np.full(q.scales.shape, 8, np.uint8) if q.zeros is None else np.asarray(q.zeros)


def packed_of(k: int, groups: int, zero_point: bool, scales: Entry, offsets: bool = False) -> Packed:
    """The header's view of a 4-bit weight."""
    return Packed(4, k // groups, not zero_point and not offsets, scales.dtype.name, offsets)
