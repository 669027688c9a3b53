"""AutoAWQ's GEMM layout: 4-bit, words along the output axis with interleaved nibbles.

Per linear ``m`` of K inputs and N outputs: ``m.qweight`` int32 ``[K, N/8]``, ``m.qzeros`` int32
``[K/g, N/8]``, ``m.scales`` float16 (GPTQModel: also bfloat16) ``[K/g, N]``. Nibble i of a word is
column ``8c + ORDER[i]``; ``w = (q - z) * s``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax.convert import linear
from awq_jax.convert.source import DirectorySource
from awq_jax.errors import CheckpointError, FormatError, WeightError
from awq_jax.qtensor import QuantizedTensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column ORDER[i] of its eight
CHUNK = 1 << 16  # words transposed at a time: stays in cache
PARTS = ("qweight", "qzeros", "scales")
# Left float by every consumer without being told.
DEFAULT_FLOAT = re.compile(r"(^|\.)(lm_head|embed\w*|wte|wpe)$")


def transpose_nibbles(x: np.ndarray) -> np.ndarray:
    """uint32 ``[8, ...]`` seen as 8x8 matrices of nibbles, transposed: nibble j of word i swaps with i of j.

    Three rounds of swapping blocks of 4, 2 and 1 nibbles (Hacker's Delight, 7-3).
    """
    x = x.copy()
    for block, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        shift = np.uint32(4 * block)
        for i in range(8):
            if not i & block:
                swap = ((x[i] >> shift) ^ x[i + block]) & np.uint32(mask)
                x[i + block] ^= swap
                x[i] ^= swap << shift
    return x


def unpack_qweight(qweight: np.ndarray) -> np.ndarray:
    """int32 ``[K, N/8]`` along N to canonical uint32 ``[ceil(K/8), N]`` along K."""
    k, c = qweight.shape
    words = np.ascontiguousarray(qweight).view(np.uint32)
    rows = -(-k // 8)
    if k % 8:
        words = np.concatenate([words, np.zeros((rows * 8 - k, c), np.uint32)])
    words = words.reshape(rows, 8, c)
    out = np.empty((rows, c, 8), np.uint32)
    step = max(1, CHUNK // max(1, 8 * c))
    for r in range(0, rows, step):
        t = transpose_nibbles(words[r : r + step].transpose(1, 0, 2))
        for i, j in enumerate(ORDER):
            out[r : r + step, :, j] = t[i]
    return out.reshape(rows, c * 8)


def pack_qweight(canonical: np.ndarray, k: int) -> np.ndarray:
    """Inverse of `unpack_qweight` for ``k`` rows."""
    rows, n = canonical.shape
    c = n // 8
    words = canonical.reshape(rows, c, 8)
    out = np.empty((rows, 8, c), np.uint32)
    step = max(1, CHUNK // max(1, n))
    for r in range(0, rows, step):
        t = transpose_nibbles(np.stack([words[r : r + step, :, j] for j in ORDER]))
        out[r : r + step] = t.transpose(1, 0, 2)
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


class GemmSource(DirectorySource):
    """Reader; see the module.

    Raises:
      FormatError: for a layout other than 4-bit GEMM.
      CheckpointError: if a linear's tensors are incomplete or do not fit each other.
    """

    format = "awq-gemm"

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        self.group_size, self.zero_point = settings(config)
        super().__init__(directory, config)
        stored = set(self.files.names())
        modules = [n.removesuffix(".qweight") for n in sorted(stored) if n.endswith(".qweight")]
        self.packed = {f"{module}.weight": module for module in modules}
        for name, module in self.packed.items():
            missing = [p for p in PARTS if f"{module}.{p}" not in stored]
            if missing or name in stored:
                problem = f"lacks {module}.{missing[0]}" if missing else f"holds both {name} and {module}.qweight"
                raise CheckpointError(f"{directory} {problem}; download the checkpoint again")
            self._check(module)
        parts = {f"{m}.{p}" for m in self.packed.values() for p in PARTS}
        self._names = sorted((stored - parts) | set(self.packed))

    def _check(self, module: str) -> None:
        q, z, s = (self.files.entry(f"{module}.{p}") for p in PARTS)
        k = q.shape[0] if q.shape else 0
        n = q.shape[1] * 8 if len(q.shape) == 2 else 0
        group = k if self.group_size == -1 else self.group_size
        groups = k // group if group else 0
        fits = k > 0 and n > 0 and k % group == 0 and z.shape == (groups, n // 8) and s.shape == (groups, n)
        if not fits:
            raise CheckpointError(
                f"{self.directory}: {module} has qweight {q.shape}, qzeros {z.shape}, scales {s.shape}, which do not "
                f"fit the gemm layout at group size {self.group_size}; check quantization_config in config.json"
            )
        if q.dtype.name not in ("int32", "uint32") or z.dtype != q.dtype or s.dtype.name not in linear.FLOATS:
            raise CheckpointError(
                f"{self.directory}: {module} has dtypes {q.dtype}, {z.dtype}, {s.dtype}; the gemm layout has int32, "
                "int32 and a floating-point type"
            )

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.packed:
            return super().shape(name)
        k, c = self.files.entry(f"{self.packed[name]}.qweight").shape
        return (c * 8, k)

    def read(self, name: str) -> np.ndarray | QuantizedTensor:
        if name not in self.packed:
            return super().read(name)
        module = self.packed[name]
        qweight, qzeros, scales = (self.files.read(f"{module}.{p}") for p in PARTS)
        if not np.isfinite(scales).all():
            raise WeightError(f"{module}.scales of {self.directory} holds NaN or inf; download the checkpoint again")
        zeros = unpack_qzeros(qzeros)
        implied = not self.zero_point and bool(np.all(zeros == 8))
        k, n = qweight.shape[0], scales.shape[1]
        group = k // scales.shape[0]
        return linear.build(unpack_qweight(qweight), scales, None if implied else zeros, 4, group, k, n, "float32")


class GemmEncoder:
    """Writer; see `awq_jax.convert.registry.Encoder`."""

    def __init__(self) -> None:
        self._groups: dict[str, tuple[int, int]] = {}  # module -> (group size, K)
        self._symmetric = True
        self._float: list[str] = []

    def problem(self, name: str, q: QuantizedTensor) -> str | None:
        """Why this layout cannot hold a weight, with the remedy; None if it can."""
        other = "; save as 'awq-jax', which can hold it"
        if not name.endswith(".weight"):
            return f"{name}: gemm names weights <module>.weight"
        if q.batch:
            return f"{name} has batch axes {q.batch}, gemm holds one matrix per linear{other}"
        if re.search(r"(^|\.)lm_head\.weight$", name):
            return f"{name} is packed, but readers of gemm leave it float; quantize_head=False, or save as 'awq-jax'"
        if q.bits != 4:
            return f"{name} has {q.bits} bits, gemm holds 4 for the whole checkpoint{other}"
        if q.inv_scale is not None:
            return f"{name} has an explicit inv_scale; quantize with explicit_scale=False, or save as 'awq-jax'"
        if q.scales.shape[-2] * q.group_size != q.k:
            return f"{name}: group size {q.group_size} does not divide its {q.k} inputs (padded){other}"
        if q.n % 8:
            return f"{name} has {q.n} outputs, gemm needs a multiple of 8{other}"
        scales = np.asarray(q.scales)
        with np.errstate(over="ignore"):
            half = scales.astype(np.float16)
        if not np.isfinite(half).all() or (half.astype(np.float64) != scales.astype(np.float64)).any():
            return f"{name} has scales that float16 cannot hold exactly{other}"
        first = next(iter(self._groups.items()), None)
        if first and not self._uniform({**self._groups, name.removesuffix(".weight"): (q.group_size, q.k)}):
            return (
                f"{name} has group size {q.group_size}, {first[0]}.weight has {first[1][0]}: gemm holds one group size "
                f"for the whole checkpoint; drop the per-layer override{other.replace('; ', ', or ', 1)}"
            )
        return None

    def accept(self, name: str, value: np.ndarray | QuantizedTensor) -> None:
        """Take note of a tensor that is going to be written.

        Raises:
          FormatError: if `problem` finds one.
        """
        module = name.removesuffix(".weight")
        if isinstance(value, QuantizedTensor):
            problem = self.problem(name, value)
            if problem:
                raise FormatError(problem)
            self._groups[module] = (value.group_size, value.k)
            self._symmetric &= value.zeros is None
        elif value.ndim == 2 and module != name:
            self._float.append(module)

    def encode(self, name: str, q: QuantizedTensor) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Arrays to store, and header metadata (none)."""
        scales = np.asarray(q.scales).astype(np.float16)
        zeros = np.full(scales.shape, 8, np.uint8) if q.zeros is None else np.asarray(q.zeros)
        arrays = (pack_qweight(np.asarray(q.qweight), q.k), pack_qzeros(zeros), scales)
        module = name.removesuffix(".weight")
        return {f"{module}.{p}": a for p, a in zip(PARTS, arrays, strict=True)}, {}

    def config(self) -> dict[str, Any]:
        """The ``quantization_config`` transformers and vLLM expect.

        Raises:
          FormatError: if nothing was quantized, or a float module cannot be excluded by name.
        """
        if not self._groups:
            raise FormatError("no weight is quantized, so there is nothing for gemm to hold; save as 'float'")
        keep = [m for m in self._float if not DEFAULT_FLOAT.search(m)]
        for module in keep:
            # transformers compares whole names, vLLM looks for the entry anywhere in a module's name.
            hit = next((p for p in self._groups if module in p), None)
            if hit:
                raise FormatError(
                    f"{module} is float, but a reader that is told to skip it would skip {hit} as well, whose name "
                    "contains it; quantize both or neither, or save as 'awq-jax'"
                )
        group = next(iter(self._groups.values()))[0]
        if any(g != group for g, _ in self._groups.values()):
            group = -1
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group,
            "zero_point": not self._symmetric,
            "version": "gemm",
            "modules_to_not_convert": sorted(keep) or None,
        }

    @staticmethod
    def _uniform(groups: Mapping[str, tuple[int, int]]) -> bool:
        """One group size for all, or every group a whole column (-1)."""
        return len({g for g, _ in groups.values()}) == 1 or all(g == k for g, k in groups.values())
