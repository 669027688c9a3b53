"""AutoAWQ's GEMV_FAST layout, which is llm-awq's second: 4-bit, four outputs interleaved.

Per linear ``m`` of K inputs and N outputs: ``m.qweight`` int16 ``[N/4, K]``; ``m.scales`` and ``m.qzeros``
(llm-awq: ``m.scaled_zeros``) float16 ``[8W, N]``, W of `zeros_width`, padded with zeros;
``w = q * s + sz``, where sz is ``-s * z`` rounded to float16.

Of 32 inputs ``8b + 2a + c`` (a, b in 0 … 3, c in 0, 1) of one output, nibble ``4c + b`` of the 32-bit
word a holds one each. The words of four outputs alternate every 64 inputs.
"""

from collections.abc import Mapping

import numpy as np

from awq_jax.convert.arrays import linear, nibbles
from awq_jax.convert.arrays.fitting import cast_scales, with_offsets
from awq_jax.convert.files.safetensors import Entry
from awq_jax.convert.format import Example, Format, Stored
from awq_jax.convert.formats.awq.common import AwqEncoder, AwqSource, is_version, packed_of, zeros_width
from awq_jax.convert.source import Packed
from awq_jax.qtensor import QuantizedTensor

STRIDE = 64  # inputs after which the next of four outputs follows


def unpack_qweight(qweight: np.ndarray) -> np.ndarray:
    """int16 ``[N/4, K]`` to canonical uint32 ``[K/8, N]``."""
    quads, k = qweight.shape
    # quad, 64 inputs, output of the quad, half of the 64, a
    words = np.ascontiguousarray(qweight).view(np.uint32).reshape(quads, k // STRIDE, 4, 2, 4)
    out = np.empty((k // STRIDE, 2, 4, quads, 4), np.uint32)
    for part, x, spare in nibbles.chunks(4, k // STRIDE, 2 * quads * 4):
        x.reshape(4, -1, 2, quads, 4)[...] = words[:, part].transpose(4, 1, 3, 0, 2)
        nibbles.deinterleave4(x.reshape(4, -1), spare)
        out[part] = x.reshape(4, -1, 2, quads, 4).transpose(1, 2, 0, 3, 4)
    return out.reshape(k // 8, quads * 4)


def pack_qweight(canonical: np.ndarray) -> np.ndarray:
    """Inverse of `unpack_qweight`."""
    k, quads = canonical.shape[0] * 8, canonical.shape[1] // 4
    words = canonical.reshape(k // STRIDE, 2, 4, quads, 4)
    out = np.empty((quads, k // STRIDE, 4, 2, 4), np.uint32)
    for part, x, spare in nibbles.chunks(4, k // STRIDE, 2 * quads * 4):
        x.reshape(4, -1, 2, quads, 4)[...] = words[part].transpose(2, 0, 1, 3, 4)
        nibbles.interleave4(x.reshape(4, -1), spare)
        out[:, part] = x.reshape(4, -1, 2, quads, 4).transpose(3, 1, 4, 2, 0)
    return out.reshape(quads, -1).view(np.int16)


class FastSource(AwqSource):
    """Reader; see the module.

    Raises:
      FormatError: for other settings than 4 bits.
      CheckpointError: if a linear's tensors are incomplete or do not fit each other.
    """

    format = "gemv_fast"
    words = "int16"
    required = ("qweight", "scales", "qzeros")

    def describe(self, module: str, entries: Mapping[str, Entry]) -> tuple[tuple[int, int], Packed]:
        self.check_types(module, entries, {"qweight": "int16"}, self.required[1:])
        q, s, z = (entries[p].shape for p in self.required)
        n, k = q[0] * 4, q[1]
        groups = self.groups(k)
        width = groups and zeros_width(k, k // groups)
        if k % STRIDE or not groups or not width or s != (8 * width, n) or z != s:
            raise self.misfit(module, entries)
        if entries["scales"].dtype != entries[self.required[2]].dtype:
            raise self.misfit(module, entries)
        return (n, k), packed_of(k, groups, self.zero_point, entries["scales"], offsets=True)

    def decode(
        self, module: str, arrays: Mapping[str, np.ndarray], shape: tuple[int, int], packed: Packed
    ) -> QuantizedTensor:
        n, k = shape
        groups = k // packed.group_size
        scales, offsets = (np.ascontiguousarray(arrays[p][:groups]) for p in self.required[1:])
        if not self.zero_point:
            part = f"{module}.{self.required[2]}"
            wide, eighth = offsets.astype(np.float64), scales.astype(np.float64)
            zeros = np.divide(-wide, eighth, out=np.full(wide.shape, 8.0), where=wide != -8 * eighth)
            linear.check_symmetric(zeros, 4, part, "zero_point false")
        qweight = unpack_qweight(arrays["qweight"])
        return linear.build(qweight, scales, None, 4, packed.group_size, k, n, "float32", offsets=offsets)


class FastEncoder(AwqEncoder):
    """Writer; see `awq_jax.convert.format.Encoder`."""

    version = "gemv_fast"
    multiples = (STRIDE, 8)
    padded_groups = True
    zeros_name = "qzeros"

    def values(self, name: str, q: QuantizedTensor) -> QuantizedTensor:
        """Scales and offsets in float16."""
        return with_offsets(cast_scales(q))

    def encode(self, name: str, q: QuantizedTensor) -> Stored:
        width = zeros_width(q.k, q.group_size)
        assert width is not None
        assert q.offsets is not None
        parts = {"qweight": pack_qweight(np.asarray(q.qweight))}
        for part, array in (("scales", q.scales), (self.zeros_name, q.offsets)):
            parts[part] = np.zeros((8 * width, q.n), self.scale_dtype(q))
            parts[part][: q.scales.shape[0]] = np.asarray(array)
        return self.stored(name, q, **parts), {}

    def scale_dtype(self, q: QuantizedTensor) -> np.dtype:
        """What scales and zeros are stored in."""
        return np.dtype(np.float16)


FORMAT = Format(
    name="gemv_fast",
    title="AutoAWQ GEMV_FAST: AutoAWQ, transformers",
    holds="4 bits, one group size of 32, 64 or at least 128, offsets, float16 scales, inputs in 64s, outputs in eights",
    matches=lambda config, names: is_version(config, "gemv_fast"),
    reader=FastSource,
    encoder=FastEncoder,
    example=Example("scaled zeros"),
)
