"""compressed-tensors' packed integers, what llm-compressor writes.

Per linear ``m`` of K inputs and N outputs: ``m.weight_packed`` int32 ``[N, ceil(K*bits/32)]``, codes as
one stream of bits along K, lowest first; ``m.weight_scale`` float ``[N, K/g]``; ``m.weight_shape`` int64
``(N, K)``; if asymmetric ``m.weight_zero_point`` int32 ``[ceil(N*bits/32), K/g]``, packed along N; with
act-order ``m.weight_g_idx`` int32 ``[K]``, columns staying in the order of the inputs. Codes and zero
points are stored with ``2**(bits-1)`` added, which makes them ours; ``w = (q - z) * s``.

Before 0.18 a word held ``32 // bits`` whole codes, which differs for 3, 5, 6 and 7 bits, and earlier
still zero points were int8 ``[N, K/g]``. Both are read. Act-order is part of the format up to 0.18 only.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from awq_jax.convert.arrays import codes, linear, rearrange
from awq_jax.convert.arrays.fitting import check_integer, integer_zeros
from awq_jax.convert.config_json import HfConfig, JsonObject, without_quantization
from awq_jax.convert.files.safetensors import Entry, SafetensorsDir
from awq_jax.convert.format import BaseEncoder, Format, Record, Stored, named
from awq_jax.convert.formats import compressed_tensors_config
from awq_jax.convert.formats.records import is_embedding
from awq_jax.convert.source import DirectorySource, Packed, PackedSource, Source
from awq_jax.dtypes import FLOATS
from awq_jax.errors import CheckpointError, FormatError
from awq_jax.qtensor import QuantizedTensor

log = logging.getLogger(__name__)

PARTS = ("weight_packed", "weight_scale", "weight_shape")
# Left over after the packed modules, these mean that something else is quantized as well.
FOREIGN = (
    "weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx", "input_scale", "output_scale",
    "k_scale", "v_scale", "bitmask",
)  # fmt: skip


def words(count: int, bits: int, spaced: bool = False) -> int:
    """Words that hold ``count`` codes, as a stream of bits or (``spaced``) as whole codes."""
    return -(-count // (32 // bits)) if spaced else -(-count * bits // 32)


def spacings(bits: int, held: Collection[tuple[int, int]]) -> set[bool]:
    """Whether ``(words, codes)`` all fit whole codes (True), a stream of bits (False), or both."""
    return {spaced for spaced in (False, True) if all(w == words(count, bits, spaced) for w, count in held)}


def unspaced(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint32 ``[W, M]`` of ``32 // bits`` whole codes each to the canonical words of ``count`` codes."""
    per = 32 // bits
    out = np.empty((packed.shape[0], per, packed.shape[1]), np.uint8)
    for i in range(per):
        out[:, i] = (packed >> np.uint32(i * bits)) & np.uint32(2**bits - 1)
    return codes.pack(out.reshape(-1, packed.shape[1])[:count], bits)


class CompressedSource(PackedSource):
    """Reader; see the module.

    Raises:
      FormatError: for another of the library's formats, or quantized activations or caches.
      CheckpointError: if a linear's tensors are incomplete or do not fit each other or the config.
    """

    format = compressed_tensors_config.QUANT_METHOD
    required = PARTS
    optional = ("weight_zero_point", "weight_g_idx")
    roles: ClassVar[Mapping[str, str]] = {
        "weight_packed": "nk",
        "weight_scale": "nk",
        "weight_zero_point": "nk",
        "weight_shape": "",
        "weight_g_idx": "k",
    }

    def __init__(self, directory: Path, config: JsonObject) -> None:
        self.settings = compressed_tensors_config.parse(config)
        self._symmetric: set[str] = set()  # tensors of zero points that were looked at
        super().__init__(directory, config)

    def _refuse_stray(self, rest: set[str]) -> None:
        left = next((n for n in sorted(rest) if n.rpartition(".")[2] in FOREIGN), None)
        if left:
            raise FormatError(
                f"{self.directory} holds {left}, but no packed weight that it belongs to: activations, caches and "
                f"unpacked integers are not readable{compressed_tensors_config.REMEDY}"
            )
        super()._refuse_stray(rest)

    def describe(self, module: str, entries: Mapping[str, Entry]) -> tuple[tuple[int, int], Packed]:
        scheme = self.settings.of(module)
        n, k = self._shape(module, entries["weight_shape"])
        p, s = entries["weight_packed"], entries["weight_scale"]
        groups = -(-k // scheme.group_size) if scheme.group_size else 1
        scale_shapes = [(1,), ()] if scheme.strategy == "tensor" else [(n, groups)]
        fits = p.shape[:1] == (n,) and len(p.shape) == 2 and bool(spacings(scheme.bits, [(p.shape[1], k)]))
        if not fits or s.shape not in scale_shapes:
            raise CheckpointError(
                f"{module} has weight_packed {p.shape} and weight_scale {s.shape}, which do not fit "
                f"its weight_shape ({n}, {k}), {scheme.bits} bits and strategy {scheme.strategy!r} with group size "
                f"{scheme.group_size}"
            )
        if groups > 1 and k != groups * scheme.group_size:
            raise CheckpointError(f"{module} has {k} inputs, which its group size {scheme.group_size} does not divide")
        if p.dtype != np.int32 or s.dtype.name not in FLOATS:
            raise CheckpointError(
                f"{module} has weight_packed of {p.dtype} and weight_scale of {s.dtype}; packed "
                "checkpoints have int32 and a floating-point type"
            )
        zero, index = entries.get("weight_zero_point"), entries.get("weight_g_idx")
        if zero is None and not scheme.symmetric:
            raise CheckpointError(f"{module} lacks its weight_zero_point; download the checkpoint again")
        if zero is not None:
            if zero.dtype == np.int8:
                fits = zero.shape in scale_shapes
            else:
                packable = zero.dtype == np.int32 and scheme.strategy != "tensor"
                fits = packable and zero.shape[1:] == (groups,)
                fits = fits and bool(spacings(scheme.bits, [(p.shape[1], k), (zero.shape[0], n)]))
            if not fits:
                raise CheckpointError(
                    f"{module}.weight_zero_point is {zero.dtype} {zero.shape}, which does not fit "
                    f"{n} outputs, {groups} groups and {scheme.bits} bits"
                )
        if scheme.act_order and index is None and groups > 1:
            raise CheckpointError(f"{module} lacks its weight_g_idx; download the checkpoint again")
        if index is not None and (index.shape != (k,) or index.dtype not in (np.int32, np.int64)):
            raise CheckpointError(f"{module}.weight_g_idx is {index.dtype} {index.shape}; it must hold {k} integers")
        ordered = index is not None and self._ordered(f"{module}.weight_g_idx", groups)
        if ordered and not scheme.act_order:
            raise CheckpointError(
                f"{module}.weight_g_idx is in act-order, and actorder of its config group not 'group'"
            )
        return (n, k), Packed(scheme.bits, k // groups, scheme.symmetric, s.dtype.name, act_order=ordered)

    def _ordered(self, part: str, groups: int) -> bool:
        index = self.files.read(part)
        empty = bool((index == -1).all())  # made, never filled in
        return not empty and rearrange.permutation(index, groups, part) is not None

    def _shape(self, module: str, entry: Entry) -> tuple[int, int]:
        """``(N, K)``, the only tensor whose values say what the others should be."""
        if entry.shape != (2,) or entry.dtype not in (np.int32, np.int64):
            raise CheckpointError(
                f"{module}.weight_shape is {entry.dtype} {entry.shape}; only matrices, of a shape of "
                "two integers, are readable"
            )
        n, k = (int(v) for v in self.files.read(f"{module}.weight_shape"))
        if not (0 < n < 2**31 and 0 < k < 2**31):
            raise CheckpointError(f"{module}.weight_shape is ({n}, {k}); download it again")
        return n, k

    def decode(
        self, module: str, arrays: Mapping[str, np.ndarray], shape: tuple[int, int], packed: Packed
    ) -> QuantizedTensor:
        n, k = shape
        bits, groups = packed.bits, k // packed.group_size
        stored, zeros, scale = arrays["weight_packed"], arrays.get("weight_zero_point"), arrays["weight_scale"]
        held = [(stored.shape[1], k)]
        if zeros is not None and zeros.dtype != np.int8:
            held.append((zeros.shape[0], n))
        possible = spacings(bits, held)
        spaced = self.settings.spaced if len(possible) == 2 else True in possible
        qweight = rearrange.transposed(stored.view(np.uint32))
        if spaced:
            qweight = unspaced(qweight, bits, k)
        scales = np.ascontiguousarray((np.broadcast_to(scale.reshape(1, 1), (n, 1)) if scale.size == 1 else scale).T)
        if zeros is not None and packed.symmetric:
            self._check_symmetric(module, spaced)
            zeros = None
        elif zeros is not None:
            zeros = _zeros(f"{module}.weight_zero_point", zeros, bits, n, groups, spaced)
        index = arrays["weight_g_idx"] if packed.act_order else None
        perm = None if index is None else rearrange.permutation(index, groups, f"{module}.weight_g_idx")
        if perm is not None:
            qweight = rearrange.take_rows(qweight, bits, perm)
        return linear.build(qweight, scales, zeros, bits, packed.group_size, k, n, "float32", perm=perm)

    def _check_symmetric(self, module: str, spaced: bool) -> None:
        """Refuse zero points of a symmetric module other than the middle; all of them, once, whatever is decoded."""
        part = f"{module}.weight_zero_point"
        if part not in self._symmetric:
            info = self.packed[f"{module}.weight"][1]
            assert info.packed is not None
            (n, k), bits = info.shape, info.packed.bits
            zeros = _zeros(part, self.files.read(part), bits, n, k // info.packed.group_size, spaced)
            linear.check_symmetric(zeros, bits, part, "symmetric true")
            self._symmetric.add(part)


def _zeros(part: str, stored: np.ndarray, bits: int, n: int, groups: int, spaced: bool) -> np.ndarray:
    """Zero points in any of their forms as uint8 ``[K/g, N]``."""
    if stored.dtype != np.int8:
        packed = stored.view(np.uint32)
        packed = unspaced(packed, bits, n) if spaced else packed
        return np.ascontiguousarray(codes.unpack(packed, bits, n).T)
    shifted = stored.astype(np.int16) + 2 ** (bits - 1)
    if shifted.min() < 0 or shifted.max() >= 2**bits:
        raise CheckpointError(f"{part} has values that {bits} bits do not hold")
    full = np.broadcast_to(shifted.reshape(-1, 1) if shifted.size == 1 else shifted, (n, groups))
    return np.ascontiguousarray(full.T).astype(np.uint8)


class CompressedEncoder(BaseEncoder):
    """Writer; see `awq_jax.convert.format.Encoder`."""

    def fit(self, name: str, q: QuantizedTensor) -> QuantizedTensor | None:
        if is_embedding(name):
            return None
        q = rearrange.unpadded(q)
        check_integer(name, q, bits=range(2, 9), format=compressed_tensors_config.QUANT_METHOD, perm=True)
        return rearrange.without_trivial_perm(integer_zeros(q))

    def encode(self, name: str, q: QuantizedTensor) -> Stored:
        arrays = {
            "weight_packed": rearrange.transposed(rearrange.unpermuted(q)).view(np.int32),
            "weight_scale": np.ascontiguousarray(np.asarray(q.scales).T),
            "weight_shape": np.array([q.n, q.k], np.int64),
        }
        if q.zeros is not None:
            zeros = np.ascontiguousarray(np.asarray(q.zeros).T)
            arrays["weight_zero_point"] = codes.pack(zeros, q.bits).view(np.int32)
        if q.perm is not None:
            arrays["weight_g_idx"] = rearrange.group_index(np.asarray(q.perm), q.group_size)
        return named(name, **arrays), {}

    def config(self, records: Sequence[Record]) -> JsonObject:
        """The ``quantization_config`` vLLM and transformers expect."""
        return {"quantization_config": compressed_tensors_config.written(records)}


class DecompressedSource(DirectorySource):
    """Float weights beside the scales that they were packed with, which are left out; ``config`` says nothing of them.

    compressed-tensors unpacks a model at its first forward pass, and transformers saves what it then holds.

    Raises:
      FormatError: activations or caches are quantized, or a weight is not float.
      CheckpointError: a file is damaged.
    """

    def __init__(self, directory: Path, config: JsonObject) -> None:
        compressed_tensors_config.refuse_activations(config)
        super().__init__(directory, without_quantization(config))
        left = set(_beside_floats(self.files.entries))
        self._names = sorted(set(self.files.names()) - left)
        odd = next((n for n in self._names if n.rpartition(".")[2] in (*PARTS, *FOREIGN)), None)
        if odd:
            raise FormatError(
                f"{directory} holds {odd}, though its quantization_config says that the weights are float: there is "
                f"no float weight beside it{compressed_tensors_config.REMEDY}"
            )
        log.info("%s: the weights are float already; the scales beside them are left out", directory)

    def names(self) -> list[str]:
        return list(self._names)


def _beside_floats(entries: Mapping[str, Entry]) -> list[str]:
    """What packed weights have, of modules that have a float one."""
    modules = {
        n.removesuffix(".weight") for n, e in entries.items() if n.endswith(".weight") and e.dtype.name in FLOATS
    }
    parts = {*PARTS[1:], *CompressedSource.optional, "weight_global_scale"}
    return [n for n in entries if n.rpartition(".")[2] in parts and n.rpartition(".")[0] in modules]


def _opened(directory: Path, config: JsonObject) -> Source:
    quant = compressed_tensors_config.entry(config) or {}
    if quant.get("quantization_status") == "decompressed":
        return DecompressedSource(directory, config)
    if quant.get("format") == compressed_tensors_config.PACKED:
        entries = SafetensorsDir(directory).entries
        left = _beside_floats(entries)
        if any(n.endswith(".weight_scale") for n in left) and not any(n.endswith(f".{PARTS[0]}") for n in entries):
            return DecompressedSource(directory, config)
    return CompressedSource(directory, config)


def _matches(config: HfConfig, names: Collection[str]) -> bool:
    found = compressed_tensors_config.entry(config)
    method = found.get("quant_method") if isinstance(found, dict) else None
    return isinstance(method, str) and method.lower() == compressed_tensors_config.QUANT_METHOD


FORMAT = Format(
    name=compressed_tensors_config.QUANT_METHOD,
    title="compressed-tensors, packed integers: vLLM, llm-compressor, transformers",
    holds="2 to 8 bits, any group size, per module and of the head; whole zero points; any scale type; act-order",
    matches=_matches,
    reader=_opened,
    encoder=CompressedEncoder,
)
