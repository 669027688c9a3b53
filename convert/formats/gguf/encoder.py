"""Writing GGUF: which block a weight fits, and what llama.cpp calls it.

Float matrices (embeddings, a head that was left float) become F16 where that is exact, else BF16
where that is, else F32; vectors are F32, as llama.cpp wants norms and biases.
"""

import dataclasses
import functools

import ml_dtypes
import numpy as np

from awq_jax.convert.arrays import codes
from awq_jax.convert.arrays.fitting import cast_scales, check_integer, constants_in_range, with_offsets
from awq_jax.convert.arrays.rearrange import regroup
from awq_jax.convert.format import BaseEncoder, Destination, Example, Format, Stored
from awq_jax.convert.formats.gguf.blocks import BLOCK, to_blocks
from awq_jax.convert.formats.gguf.config import ARCHITECTURES
from awq_jax.convert.formats.gguf.metadata import GGUF_OF, architecture
from awq_jax.convert.formats.gguf.names import permute, rotated, to_gguf_name
from awq_jax.convert.formats.gguf.sink import GgufSink
from awq_jax.convert.source import is_recomputed
from awq_jax.errors import FormatError
from awq_jax.qtensor import QuantizedTensor


class GgufEncoder(BaseEncoder):
    """Stores weights of up to 4 bits in blocks of ``kind``, wider ones in Q8_0; see `awq_jax.convert.format.Encoder`.

    `encode` gives uint8 arrays ``[N, bytes of a row]`` by llama.cpp's names, and the block type of each
    as metadata: what `awq_jax.convert.formats.gguf.sink.GgufSink` takes.
    """

    def __init__(self, kind: str, destination: Destination) -> None:
        super().__init__(destination)
        self.kind = kind

    def fit(self, name: str, q: QuantizedTensor) -> QuantizedTensor | None:
        format = f"gguf-{self.kind.lower()}"
        check_integer(name, q, bits=range(2, 9), format=format)
        if q.group_size % BLOCK:
            raise FormatError(
                f"{name} has group size {q.group_size}, {format} has blocks of {BLOCK}: the group must be a multiple; "
                "quantize again with one, or save as 'awq-jax'"
            )
        self._name(name)
        fitted = FITS[self.kind if q.bits <= 4 else "Q8_0"](name, q)
        return regroup(cast_scales(fitted, np.float16), BLOCK)

    def encode(self, name: str, q: QuantizedTensor) -> Stored:
        kind = "Q8_0" if q.bits == 8 else "Q4_0" if q.offsets is None else "Q4_1"
        stored = self._name(name)
        return {stored: self._rows(name, to_blocks(q, kind))}, {stored: kind}

    def encode_float(self, name: str, value: np.ndarray) -> dict[str, np.ndarray]:
        if is_recomputed(name, value.shape):
            return {}
        return {self._name(name): self._rows(name, smallest(value) if value.ndim > 1 else value.astype(np.float32))}

    def _name(self, name: str) -> str:
        stored = to_gguf_name(name)
        if stored is None:
            raise FormatError(
                f"{name} has no place in a GGUF file; written are {', '.join(ARCHITECTURES)}: save as 'awq-jax'"
            )
        return stored

    def _rows(self, name: str, array: np.ndarray) -> np.ndarray:
        """Rows of q/k in the order in which llama.cpp rotates them."""
        which = rotated(name)
        if not which or not ARCHITECTURES[architecture(self.destination.config)].interleaved_rope:
            return array
        heads = self.destination.config.get("num_attention_heads")
        if which == "k":
            heads = self.destination.config.get("num_key_value_heads") or heads
        if type(heads) is not int or heads < 1 or array.shape[0] % (2 * heads):
            raise FormatError(f"{name} has {array.shape[0]} rows, not {heads!r} heads (config.json) of even size")
        return permute(array, heads)


def fit_q4_0(name: str, q: QuantizedTensor) -> QuantizedTensor:
    """For ``w = d * (q - 8)``; ``d`` may be negative.

    Raises:
      FormatError: if a zero point is not the middle of the range.
    """
    middle = 2 ** (q.bits - 1)
    q = constants_in_range(q)
    if not q.symmetric:
        odd = (nearest_zeros(q) != middle) & (np.asarray(q.scales) != 0)
        if odd.any():
            raise FormatError(
                f"{name} has zero points other than {middle} ({int(odd.sum())} of {odd.size}), Q4_0 is symmetric; "
                "convert to 'gguf-q4_1' or 'gguf-q8_0', or quantize with symmetric=True"
            )
        q = dataclasses.replace(q, zeros=None, offsets=None)
    return q if q.bits == 4 else _recoded(q, codes.codes_of(q) + np.uint8(8 - middle), 4)


def fit_q4_1(name: str, q: QuantizedTensor) -> QuantizedTensor:
    """For ``w = d * q + m``."""
    q = with_offsets(q)
    return q if q.bits == 4 else _recoded(q, codes.codes_of(q), 4)


def fit_q8_0(name: str, q: QuantizedTensor) -> QuantizedTensor:
    """For ``w = d * q`` with int8 q, which also holds narrower codes less their zero point exactly.

    -128 is kept where it occurs. llama.cpp's own quantizer stops at -127, but its products are exact
    for the whole range of int8 on the side of the weights.

    Raises:
      FormatError: if a value is further than that from zero.
    """
    if q.bits == 8 and q.symmetric:
        return q
    q = constants_in_range(q)
    zeros = np.float32(2 ** (q.bits - 1)) if q.symmetric else nearest_zeros(q)
    zeros = np.broadcast_to(np.where(np.asarray(q.scales) == 0, 0, zeros), q.scales.shape)
    wide = codes.codes_of(q).reshape(-1, q.group_size, q.n).astype(np.int16)
    wide += np.clip(128 - zeros, -1000, 1000).astype(np.int16)[:, None]  # far outside is outside
    if wide.min(initial=0) < 0 or wide.max(initial=0) > 255:
        raise FormatError(
            f"{name} has values more than 128 steps from zero, Q8_0 is symmetric with 8 bits; convert to 'mlx', "
            "which has offsets, or to 'float'"
        )
    return _recoded(dataclasses.replace(q, zeros=None, offsets=None), wide.reshape(-1, q.n).astype(np.uint8), 8)


FITS = {"Q4_0": fit_q4_0, "Q4_1": fit_q4_1, "Q8_0": fit_q8_0}


def nearest_zeros(q: QuantizedTensor) -> np.ndarray:
    """The zero points of an asymmetric weight, float32 ``[K/g, N]``: from offsets, the nearest whole ones."""
    if q.zeros is not None:
        return np.asarray(q.zeros).astype(np.float32)
    scales, offsets = (np.asarray(a).astype(np.float32) for a in (q.scales, q.offsets))
    with np.errstate(over="ignore"):
        return np.rint(-offsets / np.where(scales == 0, 1, scales))


def smallest(value: np.ndarray) -> np.ndarray:
    """The tensor as float16 if that is exact, else as bfloat16 if that is, else as float32."""
    for dtype in (np.float16, ml_dtypes.bfloat16):
        if value.dtype == dtype:
            return value
        with np.errstate(over="ignore"):
            short = value.astype(dtype)
        if (short.astype(np.float32) == value.astype(np.float32)).all():
            return short
    return value.astype(np.float32)


def _recoded(q: QuantizedTensor, wide: np.ndarray, bits: int) -> QuantizedTensor:
    return dataclasses.replace(q, qweight=codes.pack(wide, bits), bits=bits)


def _format(kind: str, file_type: int, holds: str, example: Example) -> Format:
    return Format(
        name=f"gguf-{kind.lower()}",
        title=f"GGUF with {kind} blocks, one file: llama.cpp and what is built on it",
        holds=f"{holds}; groups in multiples of 32, float16 scales; {', '.join(sorted({*ARCHITECTURES, *GGUF_OF}))}",
        matches=lambda config, names: False,
        reader=None,
        encoder=functools.partial(GgufEncoder, kind),
        sink=functools.partial(GgufSink, file_type=file_type),
        suffix=".gguf",
        example=example,
    )


# The numbers are general.file_type: mostly Q4_0, Q4_1, Q8_0.
FORMATS = (
    _format("Q4_0", 2, "4 bits, symmetric", Example("symmetric", group_size=BLOCK)),
    _format("Q4_1", 3, "4 bits with an offset", Example("offsets", group_size=BLOCK)),
    _format("Q8_0", 7, "8 bits, symmetric, and whole zero points below", Example("symmetric", 8, BLOCK)),
)
