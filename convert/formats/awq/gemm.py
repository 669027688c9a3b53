"""AutoAWQ's GEMM layout: 4-bit, words along the output axis with interleaved nibbles.

Per linear ``m`` of K inputs and N outputs: ``m.qweight`` int32 ``[K, N/8]``, ``m.qzeros`` int32
``[K/g, N/8]``, ``m.scales`` float16 (GPTQModel: also bfloat16) ``[K/g, N]``. Nibble i of a word is
column ``8c + ORDER[i]``; ``w = (q - z) * s``. Symmetric weights store z = 8 as well.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from awq_jax.convert.arrays import cpu_words, linear, nibbles
from awq_jax.convert.config_json import JsonObject
from awq_jax.convert.files.safetensors import Entry
from awq_jax.convert.format import Format, Record, Stored, quant_method
from awq_jax.convert.formats.awq import scaled_activations
from awq_jax.convert.formats.awq.common import AwqEncoder, AwqSource, packed_of, version, whole_zeros
from awq_jax.convert.source import Packed
from awq_jax.errors import FormatError
from awq_jax.qtensor import QuantizedTensor

log = logging.getLogger(__name__)

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column ORDER[i] of its eight


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
    """int32 ``[G, N/8]`` to uint8 ``[G, N]``, which it may be already (`cpu_words`)."""
    if qzeros.dtype == np.uint8:
        return qzeros
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


class GemmSource(AwqSource):
    """Reader; see the module.

    Raises:
      FormatError: for a layout other than 4-bit GEMM.
      CheckpointError: if a linear's tensors are incomplete or do not fit each other.
    """

    format = "gemm"
    required = ("qweight", "qzeros", "scales")
    roles = dict.fromkeys(required, "kn")

    def __init__(self, directory: Path, config: JsonObject) -> None:
        found = version(config["quantization_config"])
        if found != self.format:
            raise FormatError(
                f"AWQ version {found!r:.80} is not readable; known are gemm, gemv, gemv_fast, marlin and llm-awq"
            )
        super().__init__(directory, config)

    def describe(self, module: str, entries: Mapping[str, Entry]) -> tuple[tuple[int, int], Packed]:
        if cpu_words.are_in(entries):
            n, k, stored = cpu_words.sizes(module, entries)
            if self.groups(k, stored) is None:
                raise self.misfit(module, entries)
            return (n, k), packed_of(k, stored, self.zero_point, entries["scales"])
        self.check_types(module, entries, {"qweight": "int32", "qzeros": "int32"}, ["scales"])
        q, z, s = (entries[p].shape for p in self.required)
        k, n = q[0], q[1] * 8
        groups = self.groups(k, s[0])
        if groups is None or s[1] != n or z != (groups, n // 8):
            raise self.misfit(module, entries)
        return (n, k), packed_of(k, groups, self.zero_point, entries["scales"])

    def whole_only(self, module: str) -> bool:
        return self.files.entry(f"{module}.qweight").dtype == np.uint8

    def decode(
        self, module: str, arrays: Mapping[str, np.ndarray], shape: tuple[int, int], packed: Packed
    ) -> QuantizedTensor:
        zeros = None
        if packed.symmetric:
            self.middle_only(f"{module}.qzeros", unpack_qzeros)
        else:
            zeros = unpack_qzeros(arrays["qzeros"])
        repacked = arrays["qweight"].dtype == np.uint8
        qweight = cpu_words.unpack(arrays["qweight"]) if repacked else unpack_qweight(arrays["qweight"])
        n, k = shape
        return linear.build(qweight, arrays["scales"], zeros, 4, packed.group_size, k, n, "float32")


class GemmEncoder(AwqEncoder):
    """Writer; see `awq_jax.convert.format.Encoder`."""

    version = "gemm"
    scale_ones = False  # vLLM, which reads of AutoAWQ's layouts this one, stops at them

    def config(self, records: Sequence[Record]) -> JsonObject:
        """See `AwqEncoder.config`; warns where the readers of a family's files want different tensors."""
        if scaled_activations.are_in(self.destination.config):
            log.warning(
                "%s in gemm: vLLM stops at scaled activations, and transformers (with GPTQModel) wants one in every "
                "layer and else computes with what the memory held. They are stored only where something is scaled; "
                "compressed-tensors has no such tensors",
                self.destination.config["model_type"],
            )
        return super().config(records)

    def encode(self, name: str, q: QuantizedTensor) -> Stored:
        qweight, qzeros = pack_qweight(np.asarray(q.qweight), q.k), pack_qzeros(whole_zeros(q))
        return self.stored(name, q, qweight=qweight, qzeros=qzeros, scales=np.asarray(q.scales).astype(np.float16)), {}


FORMAT = Format(
    name="gemm",
    title="AutoAWQ GEMM: vLLM, transformers, AutoAWQ",
    holds="4 bits, one group size, whole zero points, float16 scales, outputs in eights",
    matches=lambda config, names: quant_method(config) == "awq",
    reader=GemmSource,
    encoder=GemmEncoder,
)
