"""Blocks of tensors: what one device of a mesh needs, without the rest in memory where the format allows it."""

import dataclasses
import math
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from awq_jax.convert.files.aligned import aligned
from awq_jax.errors import CheckpointError
from awq_jax.qtensor import QuantizedTensor

Index = tuple[slice, ...]
Tensor = np.ndarray | QuantizedTensor
WHOLE_ROWS = 4096  # bytes of a run below which rows are read whole: one call each would take longer
BLOCK = 8 << 20  # bytes of whole rows read at once


def bounds(part: slice, size: int) -> tuple[int, int]:
    """Start and end of a slice without a step."""
    start, stop, step = part.indices(size)
    assert step == 1
    return start, stop


def read_block(file: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...], index: Index) -> np.ndarray:
    """``array[index]`` of an array that lies in a file in C order, reading little more than that.

    Raises:
      CheckpointError: if the file cannot be read or is too short.
    """
    ends = [bounds(part, size) for part, size in zip(index, shape, strict=True)]
    out = aligned(tuple(b - a for a, b in ends), dtype)
    if not out.size:
        return out
    cut = max((i for i, ((a, b), size) in enumerate(zip(ends, shape, strict=True)) if b - a < size), default=0)
    inner = math.prod(shape[cut + 1 :]) * dtype.itemsize
    skip, run = ends[cut][0] * inner, (ends[cut][1] - ends[cut][0]) * inner
    row = shape[cut] * inner
    leading = [np.arange(a, b) for a, b in ends[:cut]]
    rows = np.zeros(1, np.int64)
    for size, wanted in zip(shape[:cut], leading, strict=True):
        rows = (rows[:, None] * size + wanted).reshape(-1)
    target = out.reshape(len(rows), run // dtype.itemsize).view(np.uint8)
    try:
        with file.open("rb", buffering=0) as f:
            if run >= WHOLE_ROWS or len(rows) == 1:
                for line, number in zip(target, rows.tolist(), strict=True):
                    _fill(f, line, offset + number * row + skip, file)
            else:
                _by_rows(f, target, rows, offset, row, slice(skip, skip + run), file)
    except OSError as e:
        raise CheckpointError(f"cannot read {file}: {e}") from e
    return out


def read_bytes(file: Path, offset: int, count: int, tensor: str) -> np.ndarray:
    """uint8 ``[count]`` from a file.

    Raises:
      CheckpointError: if the file cannot be read or no longer holds them; it names ``tensor``.
    """
    raw = aligned((count,), np.dtype(np.uint8))
    try:
        with file.open("rb", buffering=0) as f:
            f.seek(offset)
            view, done = memoryview(raw.data), 0
            while done < count and (got := f.readinto(view[done:])):
                done += got
    except OSError as e:
        raise CheckpointError(f"cannot read tensor {tensor!r} from {file}: {e}") from e
    if done != count:
        raise CheckpointError(f"{file} became shorter while it was read (tensor {tensor!r}); copy it again")
    return raw


def _by_rows(f: IO[bytes], out: np.ndarray, rows: np.ndarray, offset: int, row: int, wanted: slice, file: Path) -> None:
    """Runs of neighbouring rows, whole, some at a time."""
    most = max(1, BLOCK // row)
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    for first, last in zip(starts, [*starts[1:], len(rows)], strict=True):
        for at in range(int(first), int(last), most):
            count = min(most, int(last) - at)
            lines = np.empty((count, row), np.uint8)
            _fill(f, lines.reshape(-1), offset + int(rows[at]) * row, file)
            out[at : at + count] = lines[:, wanted]


def _fill(f: IO[bytes], into: np.ndarray, offset: int, file: Path) -> None:
    view, done = memoryview(into.data), 0
    while done < len(view):
        got = os.preadv(f.fileno(), [view[done:]], offset + done)
        if got == 0:
            raise CheckpointError(f"{file} became shorter while it was read; copy it again")
        done += got


def scaled(part: slice, size: int, stored: int) -> slice | None:
    """A slice of ``size`` entries as one of the ``stored`` units that hold them; None if it cuts a unit."""
    start, stop = bounds(part, size)
    if stored == 1 or (start, stop) == (0, size):
        return slice(0, stored)
    if start * stored % size or stop * stored % size:
        return None
    return slice(start * stored // size, stop * stored // size)


def cut(value: Tensor, index: Index) -> Tensor:
    """``value[index]`` for a decoded tensor; an index of a packed one has a slice for each axis of its shape.

    Raises:
      CheckpointError: if a packed weight is cut within a group.
    """
    if not isinstance(value, QuantizedTensor):
        return np.ascontiguousarray(value[index])
    roles = value.live_axes
    assert len(value.k_dims) == len(value.n_dims) == 1
    batch = tuple(part for part, role in zip(index, roles, strict=True) if role == "b")
    k, n = index[roles.index("k")], index[roles.index("n")]
    k0, k1 = bounds(k, value.k)
    n0, n1 = bounds(n, value.n)
    fields: dict[str, Any] = {}
    for field in ("qweight", "scales", "zeros", "offsets"):
        if (array := getattr(value, field)) is not None:
            rows = scaled(k, value.k, array.shape[-2])
            if rows is None:
                raise CheckpointError(f"rows {k0} to {k1} of a packed weight cut a group of {value.group_size}")
            fields[field] = np.ascontiguousarray(array[(*batch, rows, slice(n0, n1))])
    for field in ("inv_scale", "perm"):
        if (array := getattr(value, field)) is not None:
            fields[field] = np.ascontiguousarray(array[(*batch, slice(k0, k1))])
    return dataclasses.replace(value, **fields, k_dims=(k1 - k0,), n_dims=(n1 - n0,))
