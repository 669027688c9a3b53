"""Safetensors in: one file or a sharded directory, header validated before any byte is believed.

Format: https://github.com/huggingface/safetensors (u64 header length, JSON header, data). Tensors are
read with plain reads into fresh arrays rather than a memory map: a file that shrinks while it is
open then gives an error instead of killing the process, and memory holds one tensor at a time.
"""

import abc
import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeGuard

import ml_dtypes
import numpy as np

from awq_jax.convert.config_json import JsonObject
from awq_jax.convert.files.slices import Index, read_block, read_bytes
from awq_jax.errors import CheckpointError

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(scalar)
    for name, scalar in {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
        "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F32": np.float32, "F64": np.float64, "C64": np.complex64, "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies: ``nbytes`` bytes at ``offset`` of ``file``."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TensorFiles(abc.ABC):
    """Tensors in files, read one at a time.

    Attributes:
      directory: where they are.
      entries: where each tensor lies.
      metadata: of each file.
    """

    directory: Path
    entries: dict[str, Entry]
    metadata: dict[str, dict[str, str]]

    @abc.abstractmethod
    def __init__(self, directory: Path) -> None: ...

    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self.entries)

    def entry(self, name: str) -> Entry:
        """Where a tensor lies.

        Raises:
          CheckpointError: if there is no such tensor.
        """
        if name not in self.entries:
            raise CheckpointError(f"no tensor {name!r} in {self.directory}")
        return self.entries[name]

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One tensor as a fresh array in its stored dtype.

        Raises:
          CheckpointError: if there is no such tensor, or it is damaged.
        """

    def read_slice(self, name: str, index: Index) -> np.ndarray | None:
        """``tensor[index]`` (a slice for each axis, without steps) as a fresh array, the rest not kept; None if the
        files have to be read whole.

        Raises:
          CheckpointError: as `read`.
        """
        return None


class SafetensorsDir(TensorFiles):
    """Lazy view of the safetensors of a directory.

    Which files: ``model.safetensors``; else those of ``model.safetensors.index.json``; else a whole
    set ``*-00001-of-0000N.safetensors``; else the only ``*.safetensors`` there is.

    An index may name only files inside the directory. A file that is a symbolic link may lead out of
    it only where the directory is a snapshot of the Hugging Face cache, and then only into the
    ``blobs`` folder of that same repository.

    Raises:
      CheckpointError: on a missing, truncated, inconsistent or unsafe file; the message names the
        file and the tensor.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries = {}
        self.metadata = {}
        index, files = find_files(directory)
        for file in files:
            entries, self.metadata[file.name] = read_header(file)
            for name, entry in entries.items():
                if name in self.entries:
                    raise CheckpointError(
                        f"tensor {name!r} is stored twice: in {self.entries[name].file.name} and {file.name} of "
                        f"{directory}; delete the file that does not belong"
                    )
                self.entries[name] = entry
        for name, where in index.items():
            found = self.entries.get(name)
            if found is None or found.file.name != Path(where).name:
                raise CheckpointError(
                    f"{INDEX} of {directory} puts tensor {name!r} in {where}, which does not hold it; "
                    "download the checkpoint again"
                )

    def read(self, name: str) -> np.ndarray:
        e = self.entry(name)
        return read_bytes(e.file, e.offset, e.nbytes, name).view(e.dtype).reshape(e.shape)

    def read_slice(self, name: str, index: Index) -> np.ndarray:
        e = self.entry(name)
        return read_block(e.file, e.offset, e.dtype, e.shape, index)


def find_files(directory: Path) -> tuple[dict[str, str], list[Path]]:
    """``(weight map of the index or {}, safetensors files)`` of a directory; see `SafetensorsDir`.

    Raises:
      CheckpointError: if there is none, too many, or one is missing or lies outside.
    """
    if (directory / SINGLE).exists():
        return {}, [checked(directory, SINGLE)]
    if (directory / INDEX).exists():
        index = read_index(directory / INDEX)
        return index, [checked(directory, f) for f in sorted(set(index.values()))]
    found = sorted(p.name for p in directory.glob("*.safetensors"))
    shards = [m for m in (re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.safetensors", f) for f in found) if m]
    if shards and len(shards) == len(found):
        stem, total = shards[0][1], int(shards[0][3])
        missing = [i for i in range(1, total + 1) if f"{stem}-{i:05}-of-{total:05}.safetensors" not in found]
        if missing or len(found) != total:
            raise CheckpointError(
                f"{directory} has {len(found)} of {total} shards"
                + (f"; number {missing[0]} is missing" if missing else "")
                + ": download the checkpoint again"
            )
        return {}, [checked(directory, f) for f in found]
    if len(found) == 1:
        return {}, [checked(directory, found[0])]
    if not found:
        raise CheckpointError(f"{directory} holds no *.safetensors file")
    raise CheckpointError(
        f"{directory} holds {len(found)} safetensors files ({', '.join(found[:3])}, ...) and no {INDEX} to say which "
        "belong together; name the single one model.safetensors"
    )


def read_index(path: Path) -> dict[str, str]:
    """The weight map of an index: tensor name to file name.

    Raises:
      CheckpointError: if it is not one.
    """
    data = read_json(path)
    weights = data.get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) for v in weights.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names; download it again")
    return weights


def checked(directory: Path, name: str) -> Path:
    """``directory / name`` if it is a safetensors file that may be read from there.

    Raises:
      CheckpointError: if it is absent, or outside the directory (see `SafetensorsDir`).
    """
    parts = Path(name).parts
    if "\0" in name or not parts or Path(name).is_absolute() or ".." in parts or not name.endswith(".safetensors"):
        raise CheckpointError(f"{INDEX} of {directory} names {name!r}: only .safetensors files inside it are read")
    path = directory / name
    try:
        there = path.is_file()
    except OSError as e:  # such as a name of thousands of characters
        raise CheckpointError(f"{INDEX} of {directory} names {name[:100]!r}: {e.strerror}") from e
    if not there:
        raise CheckpointError(f"{path} is missing; download the checkpoint again")
    refuse_outside(path, directory)
    return path


def refuse_outside(path: Path, directory: Path) -> None:
    """Refuse a link that leads out of the checkpoint: converting it would publish another file's content.

    Raises:
      CheckpointError: naming the link and where it leads; see `SafetensorsDir` for what is allowed.
    """
    real, root = path.resolve(), directory.resolve()
    cache = root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")
    if not real.is_relative_to(root) and not (cache and real.is_relative_to(root.parent.parent / "blobs")):
        raise CheckpointError(
            f"{path} is a link to {real}, outside the checkpoint; copy the file there or open the real directory"
        )


def read_json(path: Path) -> JsonObject:
    """A JSON object from a file of a checkpoint.

    Raises:
      CheckpointError: if it cannot be read, is something else, or is a link out of its directory.
    """
    with _explained(path, "is not valid JSON"):
        refuse_outside(path, path.parent)
        if path.stat().st_size > MAX_HEADER:
            raise CheckpointError(f"{path} has over {MAX_HEADER} bytes, too many for a JSON file; download it again")
        if not (text := path.read_bytes()).strip():
            raise CheckpointError(f"{path} is empty; download it again")
        data = _loads(text)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object; it holds a {type(data).__name__}")
    return data


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Validated ``(entries, metadata)`` of one safetensors file.

    The tensors must fill the data section without a gap or an overlap, as the format demands.

    Raises:
      CheckpointError: naming the file and the tensor at fault.
    """
    with _explained(path, "has a corrupt header"), path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        if not size:
            raise CheckpointError(f"{path} is empty; download it again")
        if size < 8:
            raise CheckpointError(f"{path} is truncated: {size} bytes, less than a header; download it again")
        length = int.from_bytes(f.read(8), "little")
        if length > MAX_HEADER or length > size - 8:
            raise CheckpointError(
                f"{path} is truncated or not safetensors: its header claims {length} bytes, the file has {size}"
            )
        header = _loads(f.read(length))
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a corrupt header: a {type(header).__name__} instead of an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) and _is_text(v) for v in metadata.values()):
        raise CheckpointError(f"{path} has a corrupt header: __metadata__ must map strings to strings")
    start = 8 + length
    entries = {name: _entry(path, name, info, start, size - start) for name, info in header.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            what = "overlaps the one before it" if entry.offset < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {name!r} {what}; download the file again")
        end += entry.nbytes
    if end != size:
        raise CheckpointError(f"{path} has {size - end} bytes that belong to no tensor; download it again")
    return entries, metadata


@contextlib.contextmanager
def _explained(path: Path, problem: str) -> Iterator[None]:
    """What goes wrong when a file is read and its JSON parsed, as a `CheckpointError`."""
    try:
        yield
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e}") from e
    except CheckpointError:  # is a ValueError
        raise
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{path} {problem}: its byte {e.start} is not UTF-8; download it again") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} {problem}: {_short(e)}; download it again") from e


def _entry(path: Path, name: str, info: object, start: int, available: int) -> Entry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has dtype {_short(dtype)}; known are {', '.join(DTYPES)}")
    if not _sizes(shape) or len(shape) > 32:
        raise CheckpointError(f"{where} has an impossible shape {_short(shape)}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has impossible offsets {_short(offsets)}")
    begin, end = offsets
    if end > available:
        raise CheckpointError(
            f"{where} ends at byte {start + end}, the file at {start + available}: it is truncated; download it again"
        )
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if nbytes != end - begin:
        raise CheckpointError(f"{where} of shape {shape} and dtype {dtype} needs {nbytes} bytes, has {end - begin}")
    return Entry(path, DTYPES[dtype], tuple(shape), start + begin, nbytes)


def _sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _loads(data: bytes) -> object:
    return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if not _is_text("".join(out)):
        raise ValueError("a name holds half of a surrogate pair")
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {_short(twice)} appears twice")
    return out


def _is_text(value: str) -> bool:
    """Whether UTF-8 can hold it; JSON's escapes can also make what it cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: object) -> str:
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
