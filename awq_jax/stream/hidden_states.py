"""Hidden states between two blocks: in host memory, or in files from which a later run continues."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from awq_jax.dtypes import FLOATS


class Hidden(Protocol):
    """What goes into the next block, one batch at a time, by the number of the batch; what comes out replaces it.

    Attributes:
      batches: how many there are, those of other processes included.
      shapes: ``[B, T]`` of each.
    """

    batches: int
    shapes: list[tuple[int, int]]

    def get(self, batch: int) -> np.ndarray:
        """What goes in: tokens ``[B, T]``, or hidden states ``[B, T, hidden]``."""

    def put(self, batch: int, value: np.ndarray) -> None:
        """What came out; this process's batches in order."""

    def advance(self) -> None:
        """All batches came out: they are what goes in from now on."""

    def forget(self, before: int) -> None:
        """What came out of fewer than ``before`` blocks will not be asked for again."""


class InMemory:
    """Hidden states in host memory; each batch is replaced as it comes out.

    Args:
      tokens: int32 ``[B, T]``, all batches.
      dtype: to keep hidden states in; None for the one they come in.
    """

    def __init__(self, tokens: Sequence[np.ndarray], dtype: str | None = None) -> None:
        self.batches, self.shapes = len(tokens), [(t.shape[0], t.shape[1]) for t in tokens]
        self._values = list(tokens)
        self._dtype = dtype

    def get(self, batch: int) -> np.ndarray:
        return self._values[batch]

    def put(self, batch: int, value: np.ndarray) -> None:
        self._values[batch] = value if self._dtype is None else value.astype(FLOATS[self._dtype], copy=False)

    def advance(self) -> None:
        pass

    def forget(self, before: int) -> None:
        pass


class OnDisk:
    """Hidden states in one file per boundary between blocks; memory holds one batch.

    Args:
      directory: made if need be.
      tokens: int32 ``[B, T]``, all batches.
      own: numbers of this process's batches, rising: those in the files.
      dtype: to keep hidden states in; None for the one they come in.
      size: channels of a hidden state.
      boundary: blocks that the hidden states come out of; unless it is 0, `holds` must be true of it.
    """

    def __init__(
        self,
        directory: Path,
        tokens: Sequence[np.ndarray],
        own: Sequence[int],
        dtype: str | None,
        size: int,
        boundary: int = 0,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.batches, self.shapes = len(tokens), [(t.shape[0], t.shape[1]) for t in tokens]
        self._directory, self._tokens, self._own, self._size = directory, tokens, list(own), size
        self._dtype = None if dtype is None else FLOATS[dtype]
        self._boundary = boundary

    def get(self, batch: int) -> np.ndarray:
        if not self._boundary:
            return self._tokens[batch]
        assert self._dtype is not None
        shape = (*self._tokens[batch].shape, self._size)
        before = sum(self._tokens[i].size for i in self._own if i < batch)
        path, offset = _file(self._directory, self._boundary), before * self._size * self._dtype.itemsize
        return np.fromfile(path, self._dtype, count=math.prod(shape), offset=offset).reshape(shape)

    def put(self, batch: int, value: np.ndarray) -> None:
        if self._dtype is None:
            self._dtype = value.dtype
        with _file(self._directory, self._boundary + 1).open("wb" if batch == self._own[0] else "ab") as f:
            f.write(np.ascontiguousarray(value.astype(self._dtype, copy=False)).reshape(-1).view(np.uint8).data)
            if batch == self._own[-1]:
                f.flush()
                os.fsync(f.fileno())

    def advance(self) -> None:
        self._boundary += 1

    def forget(self, before: int) -> None:
        for path in self._directory.glob("hidden-*.bin"):
            if int(path.stem.removeprefix("hidden-")) < before:
                path.unlink(missing_ok=True)


def holds(directory: Path, boundary: int, tokens: Sequence[np.ndarray], dtype: str, size: int) -> bool:
    """Whether all that came of a process's ``tokens`` out of ``boundary`` blocks is there; see `OnDisk`."""
    path = _file(directory, boundary)
    nbytes = sum(t.size for t in tokens) * size * FLOATS[dtype].itemsize
    return boundary > 0 and path.is_file() and path.stat().st_size == nbytes


def _file(directory: Path, boundary: int) -> Path:
    return directory / f"hidden-{boundary:05}.bin"
