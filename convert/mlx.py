"""MLX's affine layout (mlx-lm): words along the inputs, a scale and a bias per group.

Per module ``m`` of K inputs and N outputs, ``b`` bits, groups of ``g``: ``m.weight`` uint32
``[N, K*b/32]``, ``m.scales`` and ``m.biases`` float ``[N, K/g]``; ``w = q * scale + bias``. Codes fill
the words of a row from the lowest bit up, also with 3, 5 and 6 bits, where they straddle words: the
canonical order, transposed. About half of the scales that MLX itself makes are negative. Embeddings
and the head may be packed as well.

``config.json`` has ``quantization: {group_size, bits, mode, <module>: {...} | false}`` (and the same
under ``quantization_config``); an entry by a module's name replaces the defaults for it.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax.convert import linear
from awq_jax.convert.fitting import cast_scales, check_integer, packed_records
from awq_jax.convert.format import BaseEncoder, Example, Format, Record, quant_method
from awq_jax.convert.layout import regroup, transposed
from awq_jax.convert.pipeline import DTYPES
from awq_jax.convert.safetensors_io import Entry
from awq_jax.convert.source import Packed, PackedSource
from awq_jax.errors import CheckpointError, FormatError
from awq_jax.qtensor import QuantizedTensor

BITS = (2, 3, 4, 5, 6, 8)  # MLX also has 1, which the canonical form has not
GROUPS = (32, 64, 128)
DEFAULTS = {"group_size": 64, "bits": 4, "mode": "affine"}  # of MLX, where an entry does not say
EXPERT = re.compile(r"\.experts\.\d+\.")


def settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The default settings, and the modules that have their own (settings, or False for float).

    Raises:
      FormatError: an unknown entry, or a value out of range.
    """
    quant = config.get("quantization", config.get("quantization_config"))
    if not isinstance(quant, Mapping):
        raise FormatError("config.json: quantization must be an object with group_size and bits")
    default = _checked("quantization", {k: v for k, v in quant.items() if k in DEFAULTS})
    modules: dict[str, Any] = {}
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


def _checked(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
        raise FormatError(
            f"config.json: {where} has {unknown[0]!r}, which is not known; known are {', '.join(DEFAULTS)}"
        )
    out = {**DEFAULTS, **given}
    if out["mode"] != "affine":
        raise FormatError(f"config.json: {where} has mode {out['mode']!r:.80}; of MLX's modes 'affine' is readable")
    for key, allowed in (("bits", BITS), ("group_size", GROUPS)):
        if type(out[key]) is not int or out[key] not in allowed:
            raise FormatError(f"config.json: {where}.{key} is {out[key]!r:.80}; it must be one of {allowed}")
    return out


class MlxSource(PackedSource):
    """Reader; see the module.

    Raises:
      FormatError: another mode than affine, or settings that are not known.
      CheckpointError: a module's tensors do not fit each other or the config.
    """

    format = "mlx"
    required = ("scales", "biases", "weight")

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        self.default, self.modules = settings(config)
        super().__init__(directory, config)
        missing = sorted(m for m, s in self.modules.items() if s and f"{m}.weight" not in self.packed)
        if missing:
            raise CheckpointError(
                f"{directory}: config.json says that {missing[0]} is quantized, but {missing[0]}.scales is not there"
            )

    def describe(self, module: str, entries: Mapping[str, Entry]) -> tuple[tuple[int, int], Packed]:
        w, s, b = (entries[p] for p in ("weight", "scales", "biases"))
        chosen = self.modules.get(module, self.default)
        if not chosen:
            raise CheckpointError(f"{self.directory}: {module} is quantized, but config.json says it is not")
        bits, group = chosen["bits"], chosen["group_size"]
        if len(w.shape) == 3:
            raise FormatError(
                f"{self.directory}: {module}.weight is a stack of {w.shape[0]} experts, which is not readable; convert "
                "the float checkpoint it was made from"
            )
        if (
            len(w.shape) != 2
            or 0 in (*w.shape, *s.shape)
            or s.shape != (w.shape[0], w.shape[1] * 32 // (bits * group))
            or w.shape[1] * 32 != s.shape[-1] * group * bits
            or b.shape != s.shape
        ):
            raise CheckpointError(
                f"{self.directory}: {module} has weight {w.shape}, scales {s.shape} and biases {b.shape}, which do not "
                f"fit each other with {bits} bits in groups of {group}, as config.json says"
            )
        if w.dtype != np.uint32 or s.dtype.name not in linear.FLOATS or b.dtype.name not in linear.FLOATS:
            raise CheckpointError(
                f"{self.directory}: {module} has dtypes {w.dtype}, {s.dtype}, {b.dtype}; MLX has uint32 and two "
                "floating-point types"
            )
        shape = w.shape[0], s.shape[1] * group
        return shape, Packed(bits, group, False, s.dtype.name, offsets=True)

    def decode(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, int], packed: Packed) -> QuantizedTensor:
        qweight, scales, offsets = (transposed(arrays[p]) for p in ("weight", "scales", "biases"))
        n, k = shape
        return linear.build(qweight, scales, None, packed.bits, packed.group_size, k, n, "float32", offsets=offsets)


class MlxEncoder(BaseEncoder):
    """Writer; see `awq_jax.convert.format.Encoder`. Scales and biases have ``target.dtype``, if that is given."""

    def fit(self, name: str, q: QuantizedTensor) -> QuantizedTensor | None:
        if EXPERT.search(name):
            raise FormatError(f"{name} is one of several experts, which mlx-lm wants stacked; save as 'awq-jax'")
        check_integer(name, q, bits=BITS, format="mlx")
        size = next((g for g in reversed(GROUPS) if q.group_size % g == 0), None)
        if size is None:
            raise FormatError(
                f"{name} has group size {q.group_size}, mlx holds {', '.join(map(str, GROUPS))}; quantize with one of "
                "those, or save as 'awq-jax'"
            )
        dtype = self._dtype(q)
        q = cast_scales(q, dtype)
        if q.offsets is None:
            zeros = 2.0 ** (q.bits - 1) if q.zeros is None else np.asarray(q.zeros).astype(np.float32)
            with np.errstate(over="ignore"):
                offsets = (np.asarray(q.scales).astype(np.float32) * -zeros).astype(dtype)
            q = dataclasses.replace(q, offsets=offsets, zeros=None)
        return regroup(q, size)

    def encode(self, name: str, q: QuantizedTensor) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        module = name.removesuffix(".weight")
        dtype = self._dtype(q)
        arrays = {
            f"{module}.weight": transposed(np.asarray(q.qweight)),
            f"{module}.scales": transposed(np.asarray(q.scales).astype(dtype, copy=False)),
            f"{module}.biases": transposed(np.asarray(q.offsets).astype(dtype, copy=False)),
        }
        return arrays, {}

    def _dtype(self, q: QuantizedTensor) -> np.dtype:
        """Of scales and biases: MLX has one for both."""
        if self.target.dtype:
            return np.dtype(DTYPES[self.target.dtype])
        scales = np.asarray(q.scales).dtype
        return scales if q.offsets is None else np.promote_types(scales, np.asarray(q.offsets).dtype)

    def config(self, records: Sequence[Record]) -> dict[str, Any]:
        """``quantization`` as mlx-lm reads it: the commonest settings, and by name the modules that differ.

        Raises:
          FormatError: if nothing is quantized.
        """
        packed = packed_records(records, "mlx")
        common = collections.Counter((r.group_size, r.bits) for r in packed).most_common(1)[0][0]
        quant: dict[str, Any] = _entry(*common)
        for r in records:
            if r.bits and (r.group_size, r.bits) != common:
                quant[r.module] = _entry(r.group_size, r.bits)
            elif not r.bits and len(r.shape) == 2 and r.module != r.name:
                quant[r.module] = False
        return {"quantization": quant, "quantization_config": quant}


def _entry(group_size: int, bits: int) -> dict[str, Any]:
    return {"group_size": group_size, "bits": bits, "mode": "affine"}


def _matches(config: Mapping[str, Any]) -> bool:
    bare = config.get("quantization_config")
    named = isinstance(bare, dict) and "bits" in bare and "group_size" in bare and not quant_method(config)
    return not quant_method(config) and ("quantization" in config or named)


FORMAT = Format(
    name="mlx",
    title="MLX affine: mlx-lm",
    holds="2, 3, 4, 5, 6 and 8 bits per module, groups of 32, 64 and 128, scales of either sign and offsets; whole "
    "zero points exactly with --dtype float32",
    matches=lambda config, names: _matches(config),
    reader=MlxSource,
    encoder=MlxEncoder,
    example=Example("offsets", group_size=64, negative=True),
)
