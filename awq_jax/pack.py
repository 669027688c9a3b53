"""Codes to 32-bit words and back, along the contracted axis.

The canonical packing is one LSB-first bit stream per column: code ``i`` of a column occupies
bits ``[i*bits, (i+1)*bits)`` of that column's words. At 4 bits nibble ``i`` of word ``r`` is row
``8r+i``; 3-bit codes straddle words (32 codes in 3 words).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def words(rows: int, bits: int) -> int:
    """32-bit words that hold ``rows`` codes of ``bits`` bits."""
    return -(-rows * bits // 32)


def _period(bits: int) -> tuple[int, int]:
    """(codes, words) after which the stream is aligned with a word again."""
    n = math.lcm(bits, 32)
    return n // bits, n // 32


def pack(codes: jax.Array, bits: int) -> jax.Array:
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


def unpack(qweight: jax.Array, bits: int, rows: int) -> jax.Array:
    """Inverse of `pack`: uint32 ``[..., W, N]`` to uint8 codes ``[..., rows, N]``."""
    *lead, w, n = qweight.shape
    mask = jnp.uint32(2**bits - 1)
    if 32 % bits == 0:  # no code straddles words: one broadcast shift, which fuses with what follows
        shifts = jnp.arange(0, 32, bits, dtype=jnp.uint32)[:, None]
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
