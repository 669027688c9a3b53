"""The container of GGUF files: metadata and the table of tensors, every length checked before it is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). The
``gguf`` package maps the file and builds an array per string, seconds for a vocabulary; this reads the
same header in a fraction of that and reports truncation. Block formats are left to ``gguf.quants``.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from pathlib import Path
from typing import IO, Any

import numpy as np

from awq_jax.convert.files.slices import read_bytes
from awq_jax.errors import CheckpointError, FormatError, needed

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_NAME = 256  # characters of a tensor's name; ggml's own limit is 64 bytes
STRING, ARRAY = 8, 9
SCALARS = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}  # value type -> struct code


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor: ``shape`` in row-major order (the reverse of the file's), ``nbytes`` at ``offset``."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    nbytes: int


class GgufFile:
    """Metadata and tensor table of a GGUF file.

    Attributes:
      path: the file.
      metadata: key to number, string, bool, or list of those (NumPy array for numbers).
      tensors: by name.

    Raises:
      FormatError: not GGUF, another version or byte order, or an unknown tensor type.
      CheckpointError: truncated or inconsistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            with path.open("rb") as f:
                self._parse(_HeaderReader(path, f))
        except OSError as e:
            raise CheckpointError(f"cannot read {path}: {e}") from e

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 ``[nbytes]``.

        Raises:
          CheckpointError: if the file no longer holds them.
        """
        info = self.tensors[name]
        return read_bytes(self.path, info.offset, info.nbytes, name)

    def _parse(self, r: _HeaderReader) -> None:
        if r.take(4) != MAGIC:
            raise FormatError(f"{self.path} is not a GGUF file: it does not start with 'GGUF'")
        version = r.scalar("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "is big-endian" if swapped else f"has GGUF version {version}"
            raise FormatError(f"{self.path} {what}; versions 2 and 3, little-endian, are read: convert it again")
        n_tensors, n_keys = r.count(24), r.count(12)
        for _ in range(n_keys):
            key = r.string()
            if key in self.metadata:
                raise CheckpointError(f"{self.path}: metadata key {key!r:.100} appears twice; convert the file again")
            self.metadata[key] = r.value(r.scalar("I"), key)
        rows = [self._row(r) for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}, not a power of two")
        start = -(-r.position // alignment) * alignment
        for name, shape, type_id, offset in rows:
            if name in self.tensors:
                raise CheckpointError(f"{self.path}: tensor {name!r} is stored twice; convert the file again")
            nbytes = self._nbytes(name, shape, type_id)
            if start + offset + nbytes > r.size:
                raise CheckpointError(
                    f"{self.path} is truncated: tensor {name!r} ends at byte {start + offset + nbytes}, the file at "
                    f"{r.size}; download it again"
                )
            self.tensors[name] = TensorInfo(name, shape, type_id, start + offset, nbytes)
        end, last = start, ""
        for info in sorted(self.tensors.values(), key=lambda t: t.offset):
            if info.offset < end or (info.offset - start) % alignment:
                raise CheckpointError(
                    f"{self.path}: tensor {info.name!r} is misaligned or overlaps {last!r}; download the file again"
                )
            end, last = info.offset + info.nbytes, info.name

    def _row(self, r: _HeaderReader) -> tuple[str, tuple[int, ...], int, int]:
        name, ndim = r.string(), r.scalar("I")
        if len(name) > MAX_NAME:
            raise CheckpointError(f"{self.path}: a tensor's name has {len(name)} characters; download it again")
        if not 0 <= ndim <= 4:
            raise CheckpointError(f"{self.path}: tensor {name!r} has {ndim} axes; GGUF allows 4: download it again")
        shape = tuple(r.scalar("Q") for _ in range(ndim))[::-1]
        return name, shape, r.scalar("I"), r.scalar("Q")

    def _nbytes(self, name: str, shape: tuple[int, ...], type_id: int) -> int:
        gguf = needed("gguf", "a GGUF file")  # which takes half a second where mistral_common is installed

        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)]
        except (ValueError, KeyError):
            raise FormatError(
                f"{self.path}: tensor {name!r} has ggml type {type_id}, unknown to the installed gguf package; "
                "update it, or convert the model to another type"
            ) from None
        if any(d == 0 for d in shape) or (shape[-1] if shape else 1) % block:
            raise CheckpointError(f"{self.path}: tensor {name!r} of shape {shape} is not whole blocks of {block}")
        return math.prod(shape) // block * size


class _HeaderReader:
    """Sequential little-endian reads that never ask for more than the file has left."""

    def __init__(self, path: Path, f: IO[bytes]) -> None:
        self._path, self._f = path, f
        self.size = os.fstat(f.fileno()).st_size
        if not self.size:
            raise CheckpointError(f"{path} is truncated: it is empty; download it again")
        self.position = 0

    def take(self, n: int) -> bytes:
        if n > self.size - self.position:
            raise CheckpointError(
                f"{self._path} is truncated or corrupt: at byte {self.position} its header claims {n} more bytes, the "
                f"file has {self.size - self.position}; download it again"
            )
        self.position += n
        return self._f.read(n)

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, least: int) -> int:
        """A number of items of at least ``least`` bytes each."""
        n = self.scalar("Q")
        if n * least > self.size - self.position:
            raise CheckpointError(
                f"{self._path} is truncated or corrupt: its header claims {n} entries at byte {self.position}, more "
                "than the file can hold; download it again"
            )
        return n

    def string(self) -> str:
        # Vocabularies of some models hold token pieces that are not valid UTF-8.
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, key: str) -> float | str | list[str] | np.ndarray:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY:
            raise CheckpointError(f"{self._path}: metadata {key!r:.100} has unknown type {kind}; download it again")
        item = self.scalar("I")
        if item == STRING:
            return [self.string() for _ in range(self.count(8))]
        if item not in SCALARS:
            raise CheckpointError(f"{self._path}: metadata {key!r:.100} is an array of unknown type {item}")
        dtype = np.dtype(np.bool_) if SCALARS[item] == "?" else np.dtype("<" + SCALARS[item])
        return np.frombuffer(self.take(self.count(dtype.itemsize) * dtype.itemsize), dtype)
