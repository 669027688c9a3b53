"""AutoAWQ's GEMV layout: 4-bit, a row of words per output.

Per linear ``m`` of K inputs and N outputs: ``m.qweight`` int32 ``[N, K/8]``, nibble i of word c is input
``8c + i``; ``m.qzeros`` int32 ``[N, W]`` likewise along the groups, ``m.scales`` float16 ``[N, 8W]``;
``w = (q - z) * s``. The groups are padded with zeros to a width W: see `zeros_width`.
"""

import math
from collections.abc import Mapping

import numpy as np

from awq_jax.convert.arrays import codes, linear
from awq_jax.convert.arrays.rearrange import transposed
from awq_jax.convert.files.safetensors import Entry
from awq_jax.convert.format import Format, Stored
from awq_jax.convert.formats.awq.common import AwqEncoder, AwqSource, is_version, packed_of, whole_zeros, zeros_width
from awq_jax.convert.source import Packed
from awq_jax.qtensor import QuantizedTensor


def unpack_qzeros(qzeros: np.ndarray, groups: int) -> np.ndarray:
    """int32 ``[N, W]`` to uint8 ``[groups, N]``, without what pads them."""
    return codes.unpack(qzeros[:, : math.ceil(groups / 8)].T.view(np.uint32), 4, groups)


class GemvSource(AwqSource):
    """Reader; see the module.

    Raises:
      FormatError: for other settings than 4 bits.
      CheckpointError: if a linear's tensors are incomplete or do not fit each other.
    """

    format = "gemv"
    required = ("qweight", "qzeros", "scales")

    def describe(self, module: str, entries: Mapping[str, Entry]) -> tuple[tuple[int, int], Packed]:
        self.check_types(module, entries, {"qweight": "int32", "qzeros": "int32"}, ["scales"])
        q, z, s = (entries[p].shape for p in self.required)
        n, k = q[0], q[1] * 8
        groups = self.groups(k)
        width = groups and zeros_width(k, k // groups)
        if not groups or not width or z != (n, width) or s != (n, 8 * width):
            raise self.misfit(module, entries)
        return (n, k), packed_of(k, groups, self.zero_point, entries["scales"])

    def decode(
        self, module: str, arrays: Mapping[str, np.ndarray], shape: tuple[int, int], packed: Packed
    ) -> QuantizedTensor:
        n, k = shape
        groups = k // packed.group_size
        zeros = None
        if packed.symmetric:
            self.middle_only(f"{module}.qzeros", lambda stored: unpack_qzeros(stored, groups))
        else:
            zeros = unpack_qzeros(arrays["qzeros"], groups)
        qweight = transposed(arrays["qweight"].view(np.uint32))
        scales = transposed(arrays["scales"][:, :groups])
        return linear.build(qweight, scales, zeros, 4, packed.group_size, k, n, "float32")


class GemvEncoder(AwqEncoder):
    """Writer; see `awq_jax.convert.format.Encoder`."""

    version = "gemv"
    multiples = (8, 8)
    padded_groups = True

    def encode(self, name: str, q: QuantizedTensor) -> Stored:
        groups = q.scales.shape[0]
        width = zeros_width(q.k, q.group_size)
        assert width is not None
        qzeros = np.zeros((q.n, width), np.int32)
        packed = codes.pack(whole_zeros(q), 4)
        qzeros[:, : packed.shape[0]] = packed.T.view(np.int32)
        scales = np.zeros((q.n, 8 * width), np.float16)
        scales[:, :groups] = np.asarray(q.scales).T
        qweight = transposed(np.asarray(q.qweight)).view(np.int32)
        return self.stored(name, q, qweight=qweight, qzeros=qzeros, scales=scales), {}


FORMAT = Format(
    name="gemv",
    title="AutoAWQ GEMV: AutoAWQ, transformers",
    holds="4 bits, one group size of 32, 64 or at least 128, whole zero points, float16 scales, inputs and outputs in "
    "eights",
    matches=lambda config, names: is_version(config, "gemv"),
    reader=GemvSource,
    encoder=GemvEncoder,
)
