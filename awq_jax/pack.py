"""Codes to words and back, along the contracted axis, in the two orders that packed weights have in memory.

The canonical order (`pack`), which files hold, is one LSB-first bit stream per column: code ``i`` of a column
occupies bits ``[i*bits, (i+1)*bits)`` of that column's 32-bit words. At 4 bits nibble ``i`` of word ``r`` is row
``8r+i``; 3-bit codes straddle words (32 codes in 3 words).

A CUDA warp wants the opposite: each output column contiguous, so that a tile of columns is the left operand of a
tensor-core product straight from registers, and codes that one mask separates. So the CUDA order (`pack_cuda`) is
uint16 ``[*B, N, W]``. Each run of 32 halfwords holds 32 rows per bit field: at 4 bits, bits ``[4i, 4i+4)`` of halfword
``32u + j`` are row ``128u + 32i + j``; at 8 bits, bits ``[8i, 8i+8)`` are row ``64u + 32i + j``. A field of 32
halfwords is called a plane; every group size that is a multiple of 32 gives each plane one scale per column.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray  # as models hold it, or as it was read from a file
PLANE = 32  # rows that one bit field of 32 consecutive halfwords holds


def words(rows: int, bits: int) -> int:
    """32-bit words that hold ``rows`` codes of ``bits`` bits."""
    return -(-rows * bits // 32)


def _period(bits: int) -> tuple[int, int]:
    """(codes, words) after which the stream is aligned with a word again."""
    n = math.lcm(bits, 32)
    return n // bits, n // 32


def pack(codes: Array, bits: int) -> jax.Array:
    """Pack ``codes [..., K, N]`` (any integer dtype, ``0 <= code < 2**bits``) to uint32 words.

    Returns:
      uint32 ``[..., ceil(K*bits/32), N]``; the unused high bits of the last word are zero.
    """
    *lead, k, n = codes.shape
    per, wide = _period(bits)
    blocks = -(-k // per)
    c = jnp.pad(codes.astype(jnp.uint32), [(0, 0)] * len(lead) + [(0, blocks * per - k), (0, 0)])
    c = c.reshape(*lead, blocks, per, n)
    out = []
    for w in range(wide):
        word = jnp.zeros((*lead, blocks, n), jnp.uint32)
        for i in range(per):
            shift = i * bits - 32 * w
            if -bits < shift < 32:
                word |= c[..., i, :] << shift if shift >= 0 else c[..., i, :] >> -shift
        out.append(word)
    return jnp.stack(out, axis=-2).reshape(*lead, blocks * wide, n)[..., : words(k, bits), :]


def unpack(qweight: Array, bits: int, rows: int) -> jax.Array:
    """Inverse of `pack`: uint32 ``[..., W, N]`` to uint8 codes ``[..., rows, N]``."""
    *lead, w, n = qweight.shape
    mask = jnp.uint32(2**bits - 1)
    if 32 % bits == 0:  # no code straddles words: one broadcast shift, which fuses with what follows
        shifts = jnp.arange(0, 32, bits, dtype=jnp.uint32).reshape(*[1] * (len(lead) + 1), -1, 1)
        codes = (qweight[..., :, None, :] >> shifts) & mask
        return codes.astype(jnp.uint8).reshape(*lead, w * (32 // bits), n)[..., :rows, :]
    per, wide = _period(bits)
    blocks = -(-rows // per)
    q = jnp.pad(qweight, [(0, 0)] * len(lead) + [(0, blocks * wide - w), (0, 0)])
    q = q.reshape(*lead, blocks, wide, n)
    out = []
    for i in range(per):
        word, shift = divmod(i * bits, 32)
        v = q[..., word, :] >> shift
        if shift + bits > 32:
            v |= q[..., word + 1, :] << (32 - shift)
        out.append((v & mask).astype(jnp.uint8))
    return jnp.stack(out, axis=-2).reshape(*lead, blocks * per, n)[..., :rows, :]


def planes(bits: int) -> int:
    """Planes in a run of 32 halfwords: codes per uint16."""
    return 16 // bits


def halfwords(rows: int, bits: int) -> int:
    """uint16 per column for ``rows`` rows in the CUDA order, whole runs."""
    return -(-rows // (PLANE * planes(bits))) * PLANE


def pack_cuda(codes: Array, bits: int) -> jax.Array:
    """Pack uint8 ``codes [*B, K, N]`` of 4 or 8 bits to uint16 ``[*B, N, W]``; rows beyond K are zero."""
    *lead, rows, n = codes.shape
    w, count = halfwords(rows, bits), planes(bits)
    codes = jnp.swapaxes(codes, -1, -2)
    codes = jnp.pad(codes, [(0, 0)] * (len(lead) + 1) + [(0, w * count - rows)]).astype(jnp.uint16)
    shifts = jnp.arange(0, 16, bits, dtype=jnp.uint16).reshape(*[1] * (len(lead) + 2), -1, 1)
    fields = codes.reshape(*lead, n, w // PLANE, count, PLANE) << shifts
    return fields.sum(-2, dtype=jnp.uint16).reshape(*lead, n, w)


def unpack_cuda(qweight: Array, bits: int, rows: int, parts: int = 1) -> jax.Array:
    """Inverse of `pack_cuda`: uint16 ``[*B, N, W]`` to uint8 codes ``[*B, rows, N]``.

    ``parts``: the rows were cut into so many equal parts, each packed on its own (one for each device of a mesh).
    """
    *lead, n, w = qweight.shape
    shifts = jnp.arange(0, 16, bits, dtype=jnp.uint16).reshape(*[1] * (len(lead) + 2), -1, 1)
    fields = (qweight.reshape(*lead, n, w // PLANE, 1, PLANE) >> shifts) & jnp.uint16(2**bits - 1)
    codes = fields.astype(jnp.uint8).reshape(*lead, n, parts, w * planes(bits) // parts)[..., : rows // parts]
    return jnp.swapaxes(codes.reshape(*lead, n, rows), -1, -2)
