"""Packed codes in NumPy: to words and back, and dequantized, without touching a device."""

import dataclasses
import math

import numpy as np

from awq_jax.convert.files.aligned import aligned
from awq_jax.pack import words
from awq_jax.qtensor import QuantizedTensor

COLUMNS = ("qweight", "scales", "zeros", "offsets")  # what has an entry for each column
PIECE = 1 << 18  # floats that stay in a processor's cache


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 ``[K, N]`` to the canonical uint32 ``[ceil(K*bits/32), N]``; see `awq_jax.pack`."""
    k, n = codes.shape
    per = math.lcm(bits, 32) // bits
    wide = per * bits // 32
    blocks = -(-k // per)
    if k != blocks * per:
        codes = np.concatenate([codes, np.zeros((blocks * per - k, n), codes.dtype)])
    codes = codes.reshape(blocks, per, n)
    out = np.zeros((blocks, wide, n), np.uint32)
    for i in range(per):
        word, shift = divmod(i * bits, 32)
        code = codes[:, i].astype(np.uint32)
        out[:, word] |= code << np.uint32(shift)
        if shift + bits > 32:
            out[:, word + 1] |= code >> np.uint32(32 - shift)
    return out.reshape(blocks * wide, n)[: words(k, bits)]


def unpack(packed: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """Inverse of `pack`: uint32 ``[W, N]`` to uint8 ``[rows, N]``."""
    n = packed.shape[1]
    per = math.lcm(bits, 32) // bits
    wide = per * bits // 32
    blocks = -(-rows // per)
    if packed.shape[0] != blocks * wide:
        packed = np.concatenate([packed, np.zeros((blocks * wide - packed.shape[0], n), np.uint32)])
    packed = packed.reshape(blocks, wide, n)
    out = np.empty((blocks, per, n), np.uint8)
    mask = np.uint32(2**bits - 1)
    for i in range(per):
        word, shift = divmod(i * bits, 32)
        code = packed[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            code |= packed[:, word + 1] << np.uint32(32 - shift)
        out[:, i] = code & mask
    return out.reshape(blocks * per, n)[:rows]


def codes_of(q: QuantizedTensor) -> np.ndarray:
    """uint8 codes ``[Kp, N]`` of one matrix, rows in packed order."""
    return unpack(np.asarray(q.qweight), q.bits, q.scales.shape[-2] * q.group_size)


def dequantize(q: QuantizedTensor, dtype: type[np.floating] = np.float32) -> np.ndarray:
    """The weight ``[K, N]`` of one matrix, rows in the order of the inputs; arithmetic in ``dtype``.

    ``inv_scale`` is applied, as in `QuantizedTensor.dequantize`.
    """
    groups, n = q.scales.shape
    codes = codes_of(q).reshape(groups, q.group_size, n).astype(dtype)
    scales = np.asarray(q.scales).astype(dtype)[:, None]
    with np.errstate(invalid="ignore"):  # 0 * inf, of scales that overflowed: the caller judges the result
        if q.offsets is not None:
            w = codes * scales + np.asarray(q.offsets).astype(dtype)[:, None]
        else:
            zeros = dtype(2 ** (q.bits - 1)) if q.zeros is None else np.asarray(q.zeros).astype(dtype)[:, None]
            w = (codes - zeros) * scales
    w = w.reshape(groups * q.group_size, n)[: q.k]
    if q.perm is not None:
        restored = np.empty_like(w)
        restored[np.asarray(q.perm)] = w
        w = restored
    if q.inv_scale is not None:
        w = w * np.asarray(q.inv_scale).astype(dtype)[:, None]
    return w


def dequantize_transposed(q: QuantizedTensor) -> np.ndarray:
    """float32 ``[N, K]`` in C order: `dequantize`, transposed, holding no more than some columns twice."""
    out = aligned((q.n, q.k), np.dtype(np.float32))
    step = max(1, PIECE // q.k)
    for start in range(0, q.n, step):
        cut = slice(start, start + step)
        tables = {f: np.asarray(t)[:, cut] for f in COLUMNS if (t := getattr(q, f)) is not None}
        some = min(step, q.n - start)
        out[cut] = dequantize(dataclasses.replace(q, **tables, n_dims=(some,))).T  # type: ignore[arg-type]
    return out
