"""AutoAWQ's Marlin layout: 4-bit symmetric weights in the order of the tensor cores' fragments.

Per linear ``m`` of K inputs and N outputs: ``m.qweight`` int32 ``[K/16, 2N]``, ``m.scales`` float16
``[K/g, N]``, no zero points; ``w = (q - 8) * s``. For input ``8(2t + r) + 2m + c`` and output
``64u + 16j + 8b + i`` (r, b, c in 0, 1; m, j in 0 … 3; i in 0 … 7): row t, word ``((8u + i)4 + m)4 + j``,
nibble ``4c + 2b + r``. The columns of the scales are permuted as well: see `_order`.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from awq_jax.convert.arrays import linear, nibbles
from awq_jax.convert.files.safetensors import Entry
from awq_jax.convert.format import Example, Format, Stored
from awq_jax.convert.formats.awq.common import AwqEncoder, AwqSource, is_version, packed_of
from awq_jax.convert.source import Packed
from awq_jax.errors import FormatError
from awq_jax.qtensor import QuantizedTensor

TILE = (16, 64)  # inputs, outputs


def unpack_qweight(qweight: np.ndarray) -> np.ndarray:
    """int32 ``[K/16, 2N]`` to canonical uint32 ``[K/8, N]``."""
    rows, units = qweight.shape[0], qweight.shape[1] // 128
    words = np.ascontiguousarray(qweight).view(np.uint32).reshape(rows, units, 8, 4, 4)  # t u i m j
    out = np.empty((rows, 2, units, 4, 2, 8), np.uint32)  # t r u j b i
    for part, x, spare in nibbles.chunks(4, rows, units * 32):
        x.reshape(4, -1, units, 4, 8)[...] = words[part].transpose(3, 0, 1, 4, 2)  # m t u j i
        nibbles.deinterleave4(x.reshape(4, -1), spare)
        out[part] = x.reshape(2, 2, -1, units, 4, 8).transpose(2, 1, 3, 4, 0, 5)  # of b r t u j i
    return out.reshape(rows * 2, units * 64)


def pack_qweight(canonical: np.ndarray) -> np.ndarray:
    """Inverse of `unpack_qweight`."""
    rows, units = canonical.shape[0] // 2, canonical.shape[1] // 64
    words = canonical.reshape(rows, 2, units, 4, 2, 8)
    out = np.empty((rows, units, 8, 4, 4), np.uint32)
    for part, x, spare in nibbles.chunks(4, rows, units * 32):
        x.reshape(2, 2, -1, units, 4, 8)[...] = words[part].transpose(4, 1, 0, 2, 3, 5)
        nibbles.interleave4(x.reshape(4, -1), spare)
        out[part] = x.reshape(4, -1, units, 4, 8).transpose(1, 2, 4, 0, 3)
    return out.reshape(rows, -1).view(np.int32)


def _order(groups: int) -> np.ndarray:
    """Which scale of a block of columns is stored where; one group per column has an order of its own."""
    if groups > 1:
        return np.arange(64).reshape(8, 8).T.ravel()
    return np.arange(32).reshape(4, 4, 2).transpose(1, 0, 2).ravel()


class MarlinSource(AwqSource):
    """Reader; see the module.

    Raises:
      FormatError: for other settings than 4 bits, symmetric.
      CheckpointError: if a linear's tensors are incomplete or do not fit each other.
    """

    format = "marlin"
    required = ("qweight", "scales")

    def describe(self, module: str, entries: Mapping[str, Entry]) -> tuple[tuple[int, int], Packed]:
        if self.zero_point:
            raise FormatError("quantization_config: the marlin layout has no zero points; zero_point is true")
        if f"{module}.qzeros" in self.files.entries:
            raise FormatError(f"{module} has qzeros, which the marlin layout has not")
        self.check_types(module, entries, {"qweight": "int32"}, ["scales"])
        q, s = (entries[p].shape for p in self.required)
        k, n = q[0] * 16, q[1] // 2
        groups = self.groups(k, s[0])
        if groups is None or s[1] != n or q[1] != 2 * n or n % TILE[1]:
            raise self.misfit(module, entries)
        return (n, k), packed_of(k, groups, False, entries["scales"])

    def decode(
        self, module: str, arrays: Mapping[str, np.ndarray], shape: tuple[int, int], packed: Packed
    ) -> QuantizedTensor:
        n, k = shape
        stored = arrays["scales"]
        order = _order(stored.shape[0])
        scales = np.empty_like(stored)
        scales.reshape(-1, order.size)[:, order] = stored.reshape(-1, order.size)
        return linear.build(unpack_qweight(arrays["qweight"]), scales, None, 4, packed.group_size, k, n, "float32")


class MarlinEncoder(AwqEncoder):
    """Writer; see `awq_jax.convert.format.Encoder`."""

    version = "marlin"
    multiples = TILE

    def values(self, name: str, q: QuantizedTensor) -> QuantizedTensor:
        """Without zero points, if all are 8.

        Raises:
          FormatError: if one is not.
        """
        q = super().values(name, q)
        if q.zeros is None:
            return q
        if not np.all(np.asarray(q.zeros) == 8):
            raise FormatError(
                f"{name} has zero points, marlin holds symmetric weights; convert to 'gemm', which vLLM repacks for "
                "its own Marlin kernel, or quantize with symmetric=True"
            )
        return dataclasses.replace(q, zeros=None)

    def encode(self, name: str, q: QuantizedTensor) -> Stored:
        scales = np.asarray(q.scales).astype(np.float16)
        order = _order(scales.shape[0])
        scales = scales.reshape(-1, order.size)[:, order].reshape(scales.shape)
        return self.stored(name, q, qweight=pack_qweight(np.asarray(q.qweight)), scales=scales), {}


FORMAT = Format(
    name="marlin",
    title="AutoAWQ Marlin: AutoAWQ",
    holds="4 bits, symmetric, one group size, float16 scales, inputs in 16s, outputs in 64s",
    matches=lambda config, names: is_version(config, "marlin"),
    reader=MarlinSource,
    encoder=MarlinEncoder,
    example=Example(form="symmetric"),
)
