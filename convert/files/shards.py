"""Safetensors out: shards of bounded size in a temporary directory that is renamed at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from awq_jax.convert.files.safetensors import DTYPES, INDEX, SINGLE, read_header
from awq_jax.errors import CheckpointError, ConfigError, Setting

NAMES = {dtype: name for name, dtype in DTYPES.items()}
SPOOL = "spool.bin"
FILES = (".gguf", ".safetensors", ".bin", ".pt")  # what directories are not called


class ShardWriter:
    """Collects tensors and writes a shard whenever the next one would exceed ``max_shard_bytes``.

    Memory: the tensors of one shard, or with ``spool`` those of one `add`. A tensor larger than the bound gets
    a shard of its own.

    Args:
      directory: where the files go; it must exist.
      max_shard_bytes: bound on the tensor bytes of a file.
      done: tensor names of the shards an earlier run has finished in this directory (`part_name`).
      on_shard: called with a shard's number once it is on disk.
      spool: keep the tensors of the shard to come in a file rather than in memory.
    """

    def __init__(
        self,
        directory: Path,
        max_shard_bytes: int,
        done: Sequence[Sequence[str]] = (),
        on_shard: Callable[[int], None] | None = None,
        spool: bool = False,
    ) -> None:
        if max_shard_bytes < 1:
            raise ConfigError(f"max_shard_bytes must be positive; got {max_shard_bytes}")
        self._directory = directory
        self._limit = max_shard_bytes
        self._spool = directory / SPOOL if spool else None
        self._pending: dict[str, np.ndarray | _Spooled] = {}
        self._metadata: dict[str, str] = {}
        self._shards: list[list[str]] = [list(names) for names in done]
        self._on_shard = on_shard
        self._names: set[str] = {name for names in done for name in names}
        self._bytes = 0

    def add(self, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
        """Add tensors that belong in one file, and what the file's header should say about them.

        Raises:
          CheckpointError: for a name given twice or a dtype safetensors cannot hold.
        """
        for name, array in tensors.items():
            if name in self._names or name == "__metadata__":
                raise CheckpointError(f"tensor {name!r} was given twice; every name is written once")
            if array.dtype not in NAMES:
                raise CheckpointError(f"tensor {name!r} has dtype {array.dtype}, which safetensors cannot hold")
            self._names.add(name)
        size = sum(a.nbytes for a in tensors.values())
        if self._pending and self._bytes + size > self._limit:
            self._flush()
        for name, array in tensors.items():
            self._pending[name] = array if self._spool is None else _spooled(self._spool, array)
        self._metadata.update(metadata or {})
        self._bytes += size

    def close(self) -> None:
        """Write what is left, give the files their final names, and write the index if there are several."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        total = 0
        for i, names in enumerate(self._shards):
            total += sum(e.nbytes for e in read_header(self._directory / part_name(i))[0].values())
            final = SINGLE if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
            os.rename(self._directory / part_name(i), self._directory / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self._directory / INDEX, index)

    def _flush(self) -> None:
        number = len(self._shards)
        write_file(self._directory / part_name(number), self._pending, {"format": "pt", **self._metadata})
        self._shards.append(list(self._pending))
        if self._on_shard is not None:
            self._on_shard(number)
        self._pending, self._metadata, self._bytes = {}, {}, 0
        if self._spool is not None:
            self._spool.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class _Spooled:
    """An array in a file, read whenever it is converted."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: None = None, copy: bool | None = None) -> np.ndarray:
        count = math.prod(self.shape)
        return np.fromfile(self.path, self.dtype, count=count, offset=self.offset).reshape(self.shape)


def _spooled(path: Path, array: np.ndarray) -> _Spooled:
    with path.open("ab") as f:
        offset = f.tell()
        f.write(raw_bytes(array))
    return _Spooled(path, offset, array.dtype, array.shape)


def raw_bytes(array: np.ndarray | _Spooled) -> memoryview:
    """The bytes of an array in C order, without a copy where they lie so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def write_file(path: Path, tensors: Mapping[str, np.ndarray | _Spooled], metadata: Mapping[str, str]) -> None:
    """One safetensors file, flushed to disk. Same tensors, same bytes: the safetensors package (0.5 to 0.8) puts
    the metadata in another order at every run, and wants all tensors in memory."""
    # Widest dtype first keeps every tensor aligned to its item size.
    names = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in names:
        a = tensors[name]
        header[name] = {"dtype": NAMES[a.dtype], "shape": list(a.shape), "data_offsets": [offset, offset + a.nbytes]}
        offset += a.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            f.write(raw_bytes(tensors[name]))
        _sync(f)


def write_json(path: Path, data: Mapping[str, object]) -> None:
    """A JSON file, flushed to disk with its name."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file, flushed to disk with its name."""
    with path.open("w", encoding="utf-8") as f:
        f.write(text)
        _sync(f)
    _sync_directory(path.parent)


@contextlib.contextmanager
def atomic_directory(dst: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``dst`` to fill; renamed to ``dst`` on success, removed on any failure.

    Args:
      dst: a directory that does not exist yet.
      overwrite: replace it if it exists and is empty or a checkpoint (holds a ``config.json``).

    Raises:
      CheckpointError: if ``dst`` exists and may not be replaced, or the disk refuses.
    """
    refuse_existing(dst, overwrite)
    temporary = dst.parent / f".{dst.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        install(temporary, dst, overwrite)
    except OSError as e:
        raise CheckpointError(f"cannot write {dst}: {e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def install(temporary: Path, dst: Path, overwrite: bool) -> None:
    """Rename a finished directory to ``dst``; what was there is removed only then.

    Raises:
      CheckpointError: if ``dst`` exists and may not be replaced.
      OSError: if the disk refuses; ``dst`` is then what it was.
    """
    for path in temporary.iterdir():  # those copied by others, too: a power cut must not leave empty files
        if path.is_file():
            with path.open("rb") as f:
                os.fsync(f.fileno())
    _sync_directory(temporary)
    refuse_existing(dst, overwrite)
    replaced = f".{dst.name}.old-"
    old = dst.parent / f"{replaced}{os.getpid()}-{secrets.token_hex(4)}"
    if dst.exists():
        os.rename(dst, old)
    try:
        os.rename(temporary, dst)
    except OSError:
        if old.exists():
            os.rename(old, dst)
        raise
    _sync_directory(dst.parent)
    for left in dst.parent.glob(f"{glob.escape(replaced)}*"):  # also by a process that was killed right here
        shutil.rmtree(left, ignore_errors=True)


def refuse_existing(dst: Path, overwrite: bool, file: bool = False) -> None:
    """Raise unless ``dst``, a directory (or ``file``), may be created.

    Raises:
      CheckpointError: if it exists and ``overwrite`` is false, or it is not an (empty) checkpoint.
    """
    if not dst.name:
        raise CheckpointError(f"{str(dst)!r} is not a directory that can be created; give it a name")
    if not file and dst.suffix.lower() in FILES:
        gguf = "; GGUF is made by awq-jax convert ... --to gguf-q4_1" if dst.suffix.lower() == ".gguf" else ""
        raise CheckpointError(f"{dst} is called like a file and would be a directory; leave {dst.suffix} out{gguf}")
    if not os.path.lexists(dst):
        return
    if not overwrite:
        replace = Setting("overwrite", True)
        raise CheckpointError(f"{dst} exists; choose another target or pass {replace}", replace)
    if file:
        if dst.is_symlink() or not dst.is_file():
            raise CheckpointError(f"{dst} exists and is not a file, so it stays; choose another target")
        return
    replaceable = dst.is_dir() and not dst.is_symlink() and ((dst / "config.json").exists() or not any(dst.iterdir()))
    if not replaceable:
        raise CheckpointError(f"{dst} exists and is not a checkpoint directory, so it stays; choose another target")


def part_name(i: int) -> str:
    """File name of shard ``i`` until all are written."""
    return f"part-{i:05}.safetensors"


def _sync(f: IO[bytes] | IO[str]) -> None:
    f.flush()
    os.fsync(f.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
