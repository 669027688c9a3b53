"""GPTQ's layout: AutoGPTQ's, which numbers its zero points from 1 (v1), and GPTQModel's v2.

Per linear ``m`` of K inputs and N outputs: ``m.qweight`` int32 ``[K*bits/32, N]``, codes as one
stream of bits along K, lowest first, which is our own form; ``m.qzeros`` int32 ``[K/g, N*bits/32]``,
packed the same way along N; ``m.scales`` float16 ``[K/g, N]``; ``m.g_idx`` int32 ``[K]``, the group of
each input. ``w = (q - z[g_idx]) * s[g_idx]``. ``qzeros`` holds z in v2 (``checkpoint_format``
``"gptq_v2"``) and z - 1 in v1 (``"gptq"``).

A v1 field of all ones stands for z = 0, which v1 never meant to hold. AutoGPTQ and vLLM add 1 to the
field and drop the carry; GPTQModel adds 1 to all fields of a word at once, as it subtracted, so that
the carry reaches the next field (not with 3 bits). We read either as its writer (``meta.quantizer``)
does, and write neither.
"""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from awq_jax.convert.arrays import codes, cpu_words, linear, rearrange
from awq_jax.convert.arrays.fitting import cast_scales, check_integer, integer_zeros
from awq_jax.convert.config_json import HfConfig, JsonObject
from awq_jax.convert.files.safetensors import Entry
from awq_jax.convert.format import BaseEncoder, Example, Format, Record, Stored, named, quant_method
from awq_jax.convert.formats import gptq_config
from awq_jax.convert.formats.records import float_by_default
from awq_jax.convert.source import Packed, PackedSource
from awq_jax.dtypes import FLOATS
from awq_jax.errors import CheckpointError, FormatError
from awq_jax.qtensor import QuantizedTensor

PARTS = ("qweight", "qzeros", "scales")
log = logging.getLogger(__name__)
REMEDY = "; convert to 'compressed-tensors' or 'awq-jax'"


def ones(bits: int) -> np.uint32:
    """The word with 1 in each of its ``32 // bits`` fields."""
    return np.uint32(sum(1 << i for i in range(0, 32, bits)))


def unpack_qzeros(qzeros: np.ndarray, bits: int, n: int, v1: bool, carries: bool) -> np.ndarray:
    """int32 ``[K/g, W]`` to uint8 zero points ``[K/g, n]``; see the module for ``carries``."""
    if qzeros.dtype == np.uint8:  # the zero points themselves: `cpu_words`
        return qzeros
    words = np.ascontiguousarray(qzeros).view(np.uint32)
    if v1 and carries and bits != 3:
        words, v1 = words + ones(bits), False
    zeros = codes.unpack(np.ascontiguousarray(words.T), bits, n).T
    if v1:
        zeros = (zeros + np.uint8(1)) & np.uint8(2**bits - 1)
    return np.ascontiguousarray(zeros)


def pack_qzeros(zeros: np.ndarray, bits: int, v1: bool) -> np.ndarray:
    """Inverse of `unpack_qzeros`; for v1 every zero point must be at least 1."""
    stored = zeros - np.uint8(1) if v1 else zeros
    return np.ascontiguousarray(codes.pack(np.ascontiguousarray(stored.T), bits).T).view(np.int32)


class GptqSource(PackedSource):
    """Reader of both versions; see the module.

    Raises:
      FormatError: for a layout other than GPTQ's, or other numbers of bits.
      CheckpointError: if a linear's tensors are incomplete or do not fit each other or the config.
    """

    required = PARTS
    optional = ("g_idx",)
    roles: ClassVar[Mapping[str, str]] = {**dict.fromkeys(PARTS, "kn"), "g_idx": "k"}

    def __init__(self, directory: Path, config: JsonObject) -> None:
        self.settings = gptq_config.parse(config)
        self.format = "gptq" if self.settings.v1 else "gptq-v2"
        self._stored: dict[str, tuple[bool, bool]] = {}  # module -> what `_zero_points` found
        self._common: set[bool] | None = None  # versions (v1?) of the symmetric modules
        self._said = False  # that the label is wrong
        super().__init__(directory, config)

    def describe(self, module: str, entries: Mapping[str, Entry]) -> tuple[tuple[int, int], Packed]:
        scheme = self.settings.of(module)
        bits, size = scheme.bits, scheme.group_size
        q, z, s = (entries[p] for p in PARTS)
        index = entries.get("g_idx")
        if cpu_words.are_in(entries):
            return self._describe_cpu_words(module, entries)
        if any(len(e.shape) != 2 or 0 in e.shape for e in (q, z, s)):
            raise CheckpointError(
                f"{module} has qweight {q.shape}, qzeros {z.shape} and scales {s.shape}; only matrices are readable"
            )
        if index is not None and (len(index.shape) != 1 or index.dtype not in (np.int32, np.int64)):
            raise CheckpointError(f"{module}.g_idx is {index.dtype} {index.shape}, not a list of integers")
        n, groups = q.shape[1], s.shape[0]
        k = index.shape[0] if index else groups * size if size > 0 else q.shape[0] * 32 // bits
        expected = -(-k // size) if size > 0 else 1
        if (
            q.shape[0] * 32 != k * bits
            or groups != expected
            or s.shape[1] != n
            or (z.shape[0], z.shape[1] * 32) != (groups, n * bits)
        ):
            raise CheckpointError(
                f"{module} has qweight {q.shape}, qzeros {z.shape}, scales {s.shape} and {k} inputs, "
                f"which do not fit each other or the {bits} bits and group size {size} of its config"
            )
        if groups > 1 and k != groups * size:
            raise CheckpointError(f"{module} has {k} inputs, which its group size {size} does not divide")
        if q.dtype != np.int32 or z.dtype != q.dtype or s.dtype.name not in FLOATS:
            raise CheckpointError(
                f"{module} has dtypes {q.dtype}, {z.dtype}, {s.dtype}; the GPTQ layout has int32, "
                "int32 and a floating-point type"
            )
        part = f"{module}.g_idx"
        ordered = index and rearrange.permutation(self.files.read(part), groups, part) is not None
        return (n, k), Packed(bits, k // groups, scheme.symmetric is not False, s.dtype.name, act_order=bool(ordered))

    def _describe_cpu_words(self, module: str, entries: Mapping[str, Entry]) -> tuple[tuple[int, int], Packed]:
        scheme, (n, k, groups) = self.settings.of(module), cpu_words.sizes(module, entries)
        size = scheme.group_size if scheme.group_size > 0 else k
        if scheme.bits != 4 or groups * size != k:
            raise CheckpointError(
                f"{module} has {k} inputs in {groups} groups of 4 bits; its config says {scheme.bits} bits, groups of "
                f"{scheme.group_size}"
            )
        part = f"{module}.g_idx"
        if "g_idx" in entries and rearrange.permutation(self.files.read(part), groups, part) is not None:
            raise FormatError(
                f"{module} is in act-order and was saved after a forward pass, which has sorted its rows; take the "
                "checkpoint that was loaded there, or save the model before it runs"
            )
        return (n, k), Packed(4, size, scheme.symmetric is not False, entries["scales"].dtype.name)

    def whole_only(self, module: str) -> bool:
        return self.files.entry(f"{module}.qweight").dtype == np.uint8

    def decode(
        self, module: str, arrays: Mapping[str, np.ndarray], shape: tuple[int, int], packed: Packed
    ) -> QuantizedTensor:
        n, k = shape
        bits, groups = packed.bits, k // packed.group_size
        v1, symmetric = self._zero_points(module)
        zeros = None if symmetric else unpack_qzeros(arrays["qzeros"], bits, n, v1, self.settings.carries)
        repacked = arrays["qweight"].dtype == np.uint8
        qweight = cpu_words.unpack(arrays["qweight"]) if repacked else arrays["qweight"].view(np.uint32)
        index = arrays.get("g_idx")
        perm = (
            rearrange.permutation(index, groups, f"{module}.g_idx") if packed.act_order and index is not None else None
        )
        if perm is not None:
            qweight = rearrange.take_rows(qweight, bits, perm)
        return linear.build(qweight, arrays["scales"], zeros, bits, packed.group_size, k, n, "float32", perm=perm)

    def _zero_points(self, module: str) -> tuple[bool, bool]:
        """Whether a module's zero points are v1's, and whether all are the middle of the range.

        Files are told apart by a label that some writers get wrong (GPTQModel 5, and transformers, which saves what
        it has made v2 of under the label v1). Of a module said to be symmetric the zero points tell; the others of
        the file are numbered as those are. All of a module's zero points are read, whatever block is decoded.

        Raises:
          FormatError: a module is said to be symmetric, and neither version makes it so; or the symmetric ones
            are of both versions, and this is none of them.
        """
        if module not in self._stored:
            symmetric = self.settings.of(module).symmetric
            found = None if symmetric is False else self._version_of(module)
            if found is None and symmetric:
                zeros = self._unpacked(module, self.settings.v1)
                linear.check_symmetric(zeros, self.settings.of(module).bits, f"{module}.qzeros", "sym true")
            self._stored[module] = (self._common_version(module), False) if found is None else (found, True)
        return self._stored[module]

    def _unpacked(self, module: str, v1: bool) -> np.ndarray:
        n = self.files.entry(f"{module}.scales").shape[1]
        return unpack_qzeros(
            self.files.read(f"{module}.qzeros"), self.settings.of(module).bits, n, v1, self.settings.carries
        )

    def _version_of(self, module: str) -> bool | None:
        """Whether v1 makes all zero points of a module the middle of the range; None if neither version does."""
        middle, labelled = 2 ** (self.settings.of(module).bits - 1), self.settings.v1
        found = next((v for v in (labelled, not labelled) if (self._unpacked(module, v) == middle).all()), None)
        if found == (not labelled) and not self._said:
            self._said = True
            log.warning(
                "%s: config.json says %s, but the zero points are those of %s (%s.qzeros, which is symmetric): read so",
                self.directory, *(gptq_config.V1 if v else gptq_config.V2 for v in (labelled, found)), module,
            )  # fmt: skip
        return found

    def _common_version(self, module: str) -> bool:
        """Whether an asymmetric module's zero points are v1's: as those of the symmetric ones, if there are any."""
        if self._common is None:
            modules = (m for m, _ in self.packed.values() if self.settings.of(m).symmetric)
            self._common = {v for m in modules if (v := self._version_of(m)) is not None} or {self.settings.v1}
        if len(self._common) > 1:
            raise FormatError(
                f"{module}.qzeros may be stored as gptq or gptq_v2 do: the symmetric modules of this file are of both "
                "kinds; fetch the checkpoint again"
            )
        return next(iter(self._common))


class GptqEncoder(BaseEncoder):
    """Writer of v1; see `awq_jax.convert.format.Encoder`."""

    name = "gptq"
    v1 = True

    def fit(self, name: str, q: QuantizedTensor) -> QuantizedTensor | None:
        if float_by_default(name):
            return None
        unit = 32 // math.gcd(32, q.bits)
        check_integer(name, q, bits=gptq_config.BITS, columns=unit, format=self.name, perm=True)
        if q.k % unit:
            raise FormatError(f"{name} has {q.k} inputs, {self.name} needs a multiple of {unit}{REMEDY}")
        fitted = rearrange.without_trivial_perm(cast_scales(integer_zeros(q)))
        if self.v1 and fitted.zeros is not None and not np.asarray(fitted.zeros).all():
            raise FormatError(
                f"{name} has zero points 0, which gptq (v1) stores as z - 1 and its readers disagree on; convert to "
                "'gptq-v2', 'compressed-tensors' or 'awq-jax'"
            )
        return fitted

    def encode(self, name: str, q: QuantizedTensor) -> Stored:
        scales = np.asarray(q.scales).astype(np.float16)
        zeros = np.full(scales.shape, 2 ** (q.bits - 1), np.uint8) if q.zeros is None else np.asarray(q.zeros)
        index = np.arange(q.k, dtype=np.int32) // q.group_size
        arrays = named(
            name,
            qweight=rearrange.unpermuted(q).view(np.int32),
            qzeros=pack_qzeros(zeros, q.bits, self.v1),
            scales=scales,
            g_idx=index if q.perm is None else rearrange.group_index(np.asarray(q.perm), q.group_size),
        )
        return arrays, {}

    def config(self, records: Sequence[Record]) -> JsonObject:
        """The ``quantization_config`` GPTQModel, vLLM and transformers expect."""
        return {"quantization_config": gptq_config.written(records, self.v1)}


class GptqV2Encoder(GptqEncoder):
    """Writer of v2."""

    name = "gptq-v2"
    v1 = False


def _matches(config: HfConfig, names: Collection[str]) -> bool:
    return quant_method(config) == "gptq" and not _matches_v2(config, names)


def _matches_v2(config: HfConfig, names: Collection[str]) -> bool:
    return quant_method(config) == "gptq" and gptq_config.layout(config["quantization_config"]) == gptq_config.V2


HOLDS = "2, 3, 4 or 8 bits, one group size, whole zero points{}, float16 scales, sizes in whole words, act-order"

FORMAT = Format(
    name="gptq",
    title="GPTQ (v1): vLLM, transformers, AutoGPTQ; GPTQModel if symmetric",
    holds=HOLDS.format(" from 1"),
    matches=_matches,
    reader=GptqSource,
    encoder=GptqEncoder,
    example=Example("symmetric"),
)
FORMAT_V2 = Format(
    name="gptq-v2",
    title="GPTQ v2: GPTQModel, transformers, recent vLLM",
    holds=HOLDS.format(""),
    matches=_matches_v2,
    reader=GptqSource,
    encoder=GptqV2Encoder,
)
