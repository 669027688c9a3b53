"""GGUF's 4- and 8-bit blocks to canonical words and back.

A row of K inputs is K/32 blocks. Q4_0: float16 ``d`` and 16 bytes, ``w = d * (q - 8)``; Q4_1: float16
``d`` and ``m``, 16 bytes, ``w = d * q + m``; Q8_0: float16 ``d`` and 32 int8, ``w = d * q``. Byte j of
the 4-bit ones holds element j in its low half and j + 16 in its high half.
Source: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml.
"""

import dataclasses

import numpy as np

from awq_jax.convert.arrays import linear
from awq_jax.convert.arrays.rearrange import transposed
from awq_jax.qtensor import QuantizedTensor

BLOCK = 32
STRIP = 1 << 14  # blocks converted at a time: they stay in cache


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A block type: ``halves`` float16 in front of ``words`` uint32 of codes; ``offset``: the second half is ``m``."""

    bits: int
    halves: int
    words: int

    @property
    def offset(self) -> bool:
        return self.halves == 2


BLOCK_TYPES = {"Q4_0": BlockType(4, 1, 4), "Q4_1": BlockType(4, 2, 4), "Q8_0": BlockType(8, 1, 8)}


def to_blocks(q: QuantizedTensor, name: str) -> np.ndarray:
    """The bytes of a weight in groups of 32 that block type ``name`` holds, uint8 ``[N, K/32 * size]``.

    Q4_0 and Q8_0: symmetric; Q4_1: with offsets. Scales and offsets are cast to float16.
    """
    kind = BLOCK_TYPES[name]
    blocks, n = q.k // BLOCK, q.n
    halves = [np.asarray(a).astype(np.float16) for a in (q.scales, q.offsets)[: kind.halves]]
    words = np.asarray(q.qweight).reshape(blocks, kind.words, n)
    out = np.empty((n, blocks, kind.halves + 2 * kind.words), np.uint16)
    step = max(1, STRIP // blocks)
    for start in range(0, n, step):
        at = slice(start, start + step)
        strip = out[at]
        for i, half in enumerate(halves):
            strip[..., i] = half.view(np.uint16)[:, at].T
        w = transposed(words[..., at].reshape(blocks * kind.words, -1)).reshape(-1, blocks, kind.words)
        codes = _halves_together(w) if kind.bits == 4 else w ^ np.uint32(0x80808080)
        strip[..., kind.halves :] = codes.view(np.uint16)
    return out.reshape(n, -1).view(np.uint8)


def from_blocks(raw: np.ndarray, name: str, n: int, k: int) -> QuantizedTensor:
    """Inverse of `to_blocks`: bytes of ``n`` rows to a weight in groups of 32 with float16 scales."""
    kind = BLOCK_TYPES[name]
    blocks = k // BLOCK
    stored = raw.view(np.uint16).reshape(n, blocks, kind.halves + 2 * kind.words)
    halves = [np.empty((blocks, n), np.float16) for _ in range(kind.halves)]
    words = np.empty((blocks * kind.words, n), np.uint32)
    step = max(1, STRIP // blocks)
    for start in range(0, n, step):
        at = slice(start, start + step)
        strip = stored[at]
        for i, half in enumerate(halves):
            half.view(np.uint16)[:, at] = strip[..., i].T
        w = np.ascontiguousarray(strip[..., kind.halves :]).view(np.uint32)
        codes = _halves_apart(w) if kind.bits == 4 else w ^ np.uint32(0x80808080)
        words[:, at] = transposed(codes.reshape(-1, blocks * kind.words))
    offsets = halves[1] if kind.offset else None
    return linear.build(words, halves[0], None, kind.bits, BLOCK, k, n, "float32", offsets=offsets)


def _halves_together(w: np.ndarray) -> np.ndarray:
    """uint32 ``[..., 4]`` of 32 nibbles in order to bytes that hold nibbles j and j + 16."""
    out = np.empty_like(w)
    for i in range(2):
        low, high = w[..., i], w[..., i + 2]
        out[..., 2 * i] = _spread(low & np.uint32(0xFFFF)) | _spread(high & np.uint32(0xFFFF)) << np.uint32(4)
        out[..., 2 * i + 1] = _spread(low >> np.uint32(16)) | _spread(high >> np.uint32(16)) << np.uint32(4)
    return out


def _halves_apart(w: np.ndarray) -> np.ndarray:
    """Inverse of `_halves_together`."""
    out = np.empty_like(w)
    for i in range(2):
        for half in range(2):
            first, second = (w[..., 2 * i + j] >> np.uint32(4 * half) for j in range(2))
            out[..., i + 2 * half] = _gather(first) | _gather(second) << np.uint32(16)
    return out


def _spread(x: np.ndarray) -> np.ndarray:
    """Four nibbles in the low half of a word to the low halves of its four bytes."""
    x = (x | x << np.uint32(8)) & np.uint32(0x00FF00FF)
    return (x | x << np.uint32(4)) & np.uint32(0x0F0F0F0F)


def _gather(x: np.ndarray) -> np.ndarray:
    """Inverse of `_spread`; the high halves of the bytes are ignored."""
    x = x & np.uint32(0x0F0F0F0F)
    x = (x | x >> np.uint32(4)) & np.uint32(0x00FF00FF)
    return (x | x >> np.uint32(8)) & np.uint32(0xFFFF)
