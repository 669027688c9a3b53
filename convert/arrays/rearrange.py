"""A packed weight rearranged: its words transposed, its groups made smaller, its rows put in and out of act-order."""

import dataclasses
import math

import numpy as np

from awq_jax.convert.arrays import codes
from awq_jax.errors import CheckpointError
from awq_jax.qtensor import Array, QuantizedTensor

ROWS, COLUMNS = 64, 512  # of a tile, which fits in the cache either way round
CODES = 1 << 22  # codes unpacked at a time


def transposed(x: np.ndarray) -> np.ndarray:
    """``x.T`` as a contiguous array, tile by tile: three times as fast as letting NumPy do it."""
    rows, columns = x.shape
    out = np.empty((columns, rows), x.dtype)
    for r in range(0, rows, ROWS):
        for c in range(0, columns, COLUMNS):
            out[c : c + COLUMNS, r : r + ROWS] = x[r : r + ROWS, c : c + COLUMNS].T
    return out


def regroup(q: QuantizedTensor, size: int) -> QuantizedTensor:
    """The same weight with groups of ``size``, which divides its own: scales and zeros repeated; ``q`` if equal."""
    times = q.group_size // size
    if times == 1:
        return q

    def finer(a: Array) -> np.ndarray:
        return np.repeat(np.asarray(a), times, axis=0)

    zeros, offsets = (a if a is None else finer(a) for a in (q.zeros, q.offsets))
    return dataclasses.replace(q, group_size=size, scales=finer(q.scales), zeros=zeros, offsets=offsets)


def unpadded(q: QuantizedTensor, least: int = 16) -> QuantizedTensor:
    """The same weight in groups that divide its rows, without rows after them; ``q`` if its own do, or none can.

    Groups become the largest that divide both the rows and the groups there were (576 rows in groups of 128: 64), or
    the whole column where one group was longer than that.

    Args:
      q: one matrix.
      least: smaller groups are none.
    """
    if q.scales.shape[0] * q.group_size == q.k:
        return q
    size = q.k if q.group_size > q.k else math.gcd(q.k, q.group_size)
    if size < min(least, q.k):
        return q
    finer = dataclasses.replace(q, group_size=size) if size == q.k else regroup(q, size)
    groups = q.k // size
    zeros, offsets = (a if a is None else np.asarray(a)[:groups] for a in (finer.zeros, finer.offsets))
    qweight = codes.pack(codes.codes_of(q)[: q.k], q.bits)
    return dataclasses.replace(
        finer, qweight=qweight, scales=np.asarray(finer.scales)[:groups], zeros=zeros, offsets=offsets
    )


def take_rows(qweight: np.ndarray, bits: int, order: np.ndarray) -> np.ndarray:
    """Canonical words ``[W, N]`` whose row ``r`` of codes is row ``order[r]`` of ``qweight``'s."""
    n = qweight.shape[1]
    out = np.empty_like(qweight)
    step = max(1, CODES // max(1, len(order)))
    for c in range(0, n, step):
        unpacked = codes.unpack(qweight[:, c : c + step], bits, len(order))
        out[:, c : c + step] = codes.pack(unpacked[order], bits)
    return out


def group_index(perm: np.ndarray, group_size: int) -> np.ndarray:
    """int32 ``[K]``: the group of each input channel, from `QuantizedTensor.perm`."""
    index = np.empty(len(perm), np.int32)
    index[perm] = np.arange(len(perm), dtype=np.int32) // group_size
    return index


def permutation(index: np.ndarray, groups: int, where: str = "g_idx") -> np.ndarray | None:
    """`QuantizedTensor.perm` from the group of each input channel; None if they are in order.

    Args:
      index: integers ``[K]``, GPTQ's ``g_idx``.
      groups: how many there are.
      where: what ``index`` is called, for messages.

    Raises:
      CheckpointError: if a group does not exist, or the groups are not of one size.
    """
    k = len(index)
    if index.min() < 0 or index.max() >= groups:
        raise CheckpointError(f"{where} names groups {index.min()} to {index.max()}, there are {groups} of them")
    if (np.diff(index) >= 0).all() and (np.bincount(index, minlength=groups) * groups == k).all():
        return None
    sizes = np.bincount(index, minlength=groups)
    if (sizes * groups != k).any():
        raise CheckpointError(
            f"{where} makes groups of {sizes.min()} to {sizes.max()} inputs; only groups of one size are readable"
        )
    return np.argsort(index, kind="stable").astype(np.int32)


def without_trivial_perm(q: QuantizedTensor) -> QuantizedTensor:
    """``q`` without a permutation that moves no channel to another group; ``q`` itself where there is none."""
    if q.perm is None:
        return q
    perm = np.asarray(q.perm)
    if permutation(group_index(perm, q.group_size), q.k // q.group_size) is not None:
        return q
    return dataclasses.replace(q, qweight=unpermuted(q), perm=None)


def unpermuted(q: QuantizedTensor) -> np.ndarray:
    """``qweight`` with its rows in the order of the input channels."""
    qweight = np.asarray(q.qweight)
    return qweight if q.perm is None else take_rows(qweight, q.bits, np.argsort(np.asarray(q.perm)))
