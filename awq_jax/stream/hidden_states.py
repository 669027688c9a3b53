"""Hidden states between two blocks: on the host, or in files that survive the process."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from awq_jax.dtypes import FLOATS


class Hidden(Protocol):
    """What goes into the next block, one batch at a time; what comes out takes its place."""

    def get(self, batch: int) -> np.ndarray:
        """What goes in: tokens ``[B, T]``, or hidden states ``[B, T, hidden]``."""

    def put(self, batch: int, value: np.ndarray) -> None:
        """What came out, batches in order."""

    def turn(self) -> None:
        """All batches came out: they are what goes in from now on."""

    def forget(self, before: int) -> None:
        """What came out of fewer than ``before`` blocks will not be asked for again."""


class InMemory:
    """Hidden states in host memory; each batch is replaced as it comes out.

    Args:
      tokens: int32 ``[B, T]`` batches.
      dtype: to keep hidden states in; None for the one they come in.
    """

    def __init__(self, tokens: Sequence[np.ndarray], dtype: str | None = None) -> None:
        self._batches = list(tokens)
        self._dtype = dtype

    def get(self, batch: int) -> np.ndarray:
        return self._batches[batch]

    def put(self, batch: int, value: np.ndarray) -> None:
        self._batches[batch] = value if self._dtype is None else value.astype(FLOATS[self._dtype], copy=False)

    def turn(self) -> None:
        pass

    def forget(self, before: int) -> None:
        pass


class OnDisk:
    """Hidden states in one file per boundary between blocks; memory holds one batch.

    Args:
      directory: made if need be.
      tokens: as for `InMemory`.
      dtype: to keep hidden states in; None for the one they come in.
      size: channels of a hidden state.
      boundary: how many blocks are behind; unless it is 0, `holds` must be true of it.
    """

    def __init__(
        self, directory: Path, tokens: Sequence[np.ndarray], dtype: str | None, size: int, boundary: int = 0
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._tokens, self._size = directory, list(tokens), size
        self._dtype = None if dtype is None else FLOATS[dtype]
        self._boundary = boundary

    def get(self, batch: int) -> np.ndarray:
        if not self._boundary:
            return self._tokens[batch]
        assert self._dtype is not None
        shape = (*self._tokens[batch].shape, self._size)
        offset = sum(t.size for t in self._tokens[:batch]) * self._size * self._dtype.itemsize
        path = _file(self._directory, self._boundary)
        return np.fromfile(path, self._dtype, count=math.prod(shape), offset=offset).reshape(shape)

    def put(self, batch: int, value: np.ndarray) -> None:
        if self._dtype is None:
            self._dtype = value.dtype
        with _file(self._directory, self._boundary + 1).open("ab" if batch else "wb") as f:
            f.write(np.ascontiguousarray(value.astype(self._dtype, copy=False)).reshape(-1).view(np.uint8).data)
            if batch == len(self._tokens) - 1:
                f.flush()
                os.fsync(f.fileno())

    def turn(self) -> None:
        self._boundary += 1

    def forget(self, before: int) -> None:
        for path in self._directory.glob("hidden-*.bin"):
            if int(path.stem.removeprefix("hidden-")) < before:
                path.unlink(missing_ok=True)


class Some:
    """The hidden states of some batches, by the numbers that those have among all.

    Args:
      kept: theirs.
      numbers: of the batches, in the order in which ``kept`` has them.
    """

    def __init__(self, kept: Hidden, numbers: Sequence[int]) -> None:
        self._kept, self._places = kept, {n: i for i, n in enumerate(numbers)}

    def get(self, batch: int) -> np.ndarray:
        return self._kept.get(self._places[batch])

    def put(self, batch: int, value: np.ndarray) -> None:
        self._kept.put(self._places[batch], value)

    def turn(self) -> None:
        self._kept.turn()

    def forget(self, before: int) -> None:
        self._kept.forget(before)


def holds(directory: Path, boundary: int, tokens: Sequence[np.ndarray], dtype: str, size: int) -> bool:
    """Whether the hidden states behind ``boundary`` blocks are there; see `OnDisk`."""
    path = _file(directory, boundary)
    nbytes = sum(t.size for t in tokens) * size * FLOATS[dtype].itemsize
    return boundary > 0 and path.is_file() and path.stat().st_size == nbytes


def _file(directory: Path, boundary: int) -> Path:
    return directory / f"hidden-{boundary:05}.bin"
