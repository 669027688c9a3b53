"""AutoAWQ's GEMM layout: 4-bit, words along the output axis with interleaved nibbles.

Per linear ``m`` of K inputs and N outputs: ``m.qweight`` int32 ``[K, N/8]``, ``m.qzeros`` int32
``[K/g, N/8]``, ``m.scales`` float16 (GPTQModel: also bfloat16) ``[K/g, N]``. Nibble i of a word is
column ``8c + ORDER[i]``; ``w = (q - z) * s``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax.convert import linear, nibbles
from awq_jax.convert.fitting import (
    DEFAULT_FLOAT,
    check_integer,
    common_group,
    float_modules,
    half_scales,
    integer_zeros,
    packed_records,
)
from awq_jax.convert.format import BaseEncoder, Format, Record, quant_method
from awq_jax.convert.safetensors_io import Entry
from awq_jax.convert.source import Packed, PackedSource
from awq_jax.errors import CheckpointError, FormatError
from awq_jax.qtensor import QuantizedTensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column ORDER[i] of its eight
PARTS = ("qweight", "qzeros", "scales")


def unpack_qweight(qweight: np.ndarray) -> np.ndarray:
    """int32 ``[K, N/8]`` along N to canonical uint32 ``[ceil(K/8), N]`` along K."""
    k, c = qweight.shape
    words = np.ascontiguousarray(qweight).view(np.uint32)
    rows = -(-k // 8)
    if k % 8:
        words = np.concatenate([words, np.zeros((rows * 8 - k, c), np.uint32)])
    words = words.reshape(rows, 8, c)
    out = np.empty((rows, c, 8), np.uint32)
    for part, x, spare in nibbles.chunks(8, rows, c):
        x[...] = words[part].transpose(1, 0, 2)
        nibbles.transpose8(x.reshape(8, -1), spare)
        for i, j in enumerate(ORDER):
            out[part, :, j] = x[i]
    return out.reshape(rows, c * 8)


def pack_qweight(canonical: np.ndarray, k: int) -> np.ndarray:
    """Inverse of `unpack_qweight` for ``k`` rows."""
    rows, n = canonical.shape
    c = n // 8
    words = canonical.reshape(rows, c, 8)
    out = np.empty((rows, 8, c), np.uint32)
    for part, x, spare in nibbles.chunks(8, rows, c):
        for i, j in enumerate(ORDER):
            x[i] = words[part, :, j]
        nibbles.transpose8(x.reshape(8, -1), spare)
        out[part] = x.transpose(1, 0, 2)
    return out.reshape(rows * 8, c)[:k].view(np.int32)


def unpack_qzeros(qzeros: np.ndarray) -> np.ndarray:
    """int32 ``[G, N/8]`` to uint8 ``[G, N]``."""
    words = np.ascontiguousarray(qzeros).view(np.uint32)
    out = np.empty((*words.shape, 8), np.uint8)
    for i, j in enumerate(ORDER):
        out[..., j] = (words >> np.uint32(4 * i)) & np.uint32(15)
    return out.reshape(words.shape[0], -1)


def pack_qzeros(zeros: np.ndarray) -> np.ndarray:
    """Inverse of `unpack_qzeros`."""
    z = zeros.reshape(zeros.shape[0], -1, 8).astype(np.uint32)
    out = np.zeros(z.shape[:2], np.uint32)
    for i, j in enumerate(ORDER):
        out |= z[..., j] << np.uint32(4 * i)
    return out.view(np.int32)


def settings(config: Mapping[str, Any]) -> tuple[int, bool]:
    """``(group_size, zero_point)`` of a checkpoint whose ``quant_method`` is ``awq``.

    Raises:
      FormatError: if it is not the GEMM layout, or not 4 bits.
    """
    quant = config["quantization_config"]
    version = quant.get("version") or quant.get("checkpoint_format") or quant.get("format") or "gemm"
    if str(version).lower() != "gemm":
        raise FormatError(f"AWQ version {version!r} is not readable; of the AWQ layouts, 'gemm' is")
    if quant.get("bits", 4) != 4:
        raise FormatError(f"quantization_config: the gemm layout is 4-bit; bits is {quant['bits']!r}")
    group, zero_point = quant.get("group_size", 128), quant.get("zero_point", True)
    if type(group) is not int or not (group == -1 or group > 0) or not isinstance(zero_point, bool):
        raise FormatError(
            f"quantization_config: group_size must be a positive integer or -1 and zero_point true or false; "
            f"got {group!r} and {zero_point!r}"
        )
    return group, zero_point


class GemmSource(PackedSource):
    """Reader; see the module.

    Raises:
      FormatError: for a layout other than 4-bit GEMM.
      CheckpointError: if a linear's tensors are incomplete or do not fit each other.
    """

    format = "gemm"
    required = PARTS

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        self.group_size, self.zero_point = settings(config)
        super().__init__(directory, config)

    def describe(self, module: str, entries: Mapping[str, Entry]) -> tuple[tuple[int, int], Packed]:
        q, z, s = (entries[p] for p in PARTS)
        if len(q.shape) != 2 or len(s.shape) != 2 or 0 in (*q.shape, *s.shape):
            raise CheckpointError(f"{self.directory}: {module}.qweight has shape {q.shape}, scales {s.shape}")
        k, n, groups = q.shape[0], q.shape[1] * 8, s.shape[0]
        expected = -(-k // self.group_size) if self.group_size > 0 else 1
        if k % groups or groups != expected or s.shape[1] != n or z.shape != (groups, n // 8):
            raise CheckpointError(
                f"{self.directory}: {module} has qweight {q.shape}, qzeros {z.shape} and scales {s.shape}, which do "
                f"not fit each other or the group size {self.group_size} of config.json"
            )
        if q.dtype != np.int32 or z.dtype != q.dtype or s.dtype.name not in linear.FLOATS:
            raise CheckpointError(
                f"{self.directory}: {module} has dtypes {q.dtype}, {z.dtype}, {s.dtype}; the gemm layout has int32, "
                "int32 and a floating-point type"
            )
        return (n, k), Packed(4, k // groups, not self.zero_point, s.dtype.name)

    def decode(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, int], packed: Packed) -> QuantizedTensor:
        zeros = unpack_qzeros(arrays["qzeros"])
        implied = packed.symmetric and bool(np.all(zeros == 8))
        qweight = unpack_qweight(arrays["qweight"])
        n, k = shape
        return linear.build(
            qweight, arrays["scales"], None if implied else zeros, 4, packed.group_size, k, n, "float32"
        )


class GemmEncoder(BaseEncoder):
    """Writer; see `awq_jax.convert.format.Encoder`."""

    version = "gemm"

    def fit(self, name: str, q: QuantizedTensor) -> QuantizedTensor | None:
        if DEFAULT_FLOAT.search(name.removesuffix(".weight")):
            return None
        check_integer(name, q, bits=(4,), columns=8, format=self.version)
        return half_scales(integer_zeros(q))

    def encode(self, name: str, q: QuantizedTensor) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        scales = np.asarray(q.scales).astype(np.float16)
        zeros = np.full(scales.shape, 8, np.uint8) if q.zeros is None else np.asarray(q.zeros)
        arrays = (pack_qweight(np.asarray(q.qweight), q.k), pack_qzeros(zeros), scales)
        module = name.removesuffix(".weight")
        return {f"{module}.{p}": a for p, a in zip(PARTS, arrays, strict=True)}, {}

    def config(self, records: Sequence[Record]) -> dict[str, Any]:
        """The ``quantization_config`` transformers and vLLM expect."""
        return {"quantization_config": awq_config(records, self.version)}


def awq_config(records: Sequence[Record], version: str) -> dict[str, Any]:
    """``quantization_config`` of an AutoAWQ layout.

    Raises:
      FormatError: if nothing is quantized, the group sizes differ, or a float module cannot be
        excluded by name.
    """
    packed = packed_records(records, version)
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": common_group(packed, version),
        "zero_point": not all(r.symmetric for r in packed),
        "version": version,
        "modules_to_not_convert": float_modules(records, version) or None,
    }


FORMAT = Format(
    name="gemm",
    title="AutoAWQ GEMM: vLLM, transformers, AutoAWQ",
    holds="4 bits, one group size, whole zero points, float16 scales, outputs in eights",
    matches=lambda config, names: quant_method(config) == "awq",
    reader=GemmSource,
    encoder=GemmEncoder,
)
