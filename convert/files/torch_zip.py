"""``.pt`` files of ``torch.save`` (zip format), read by an interpreter of our own that can run nothing.

Such a file is a zip archive: ``data.pkl``, a pickle whose tensors name the storages ``data/<key>``. A
pickle is a program for a stack machine and may import and call anything; here only the instructions
that build strings, numbers, lists, tuples and dictionaries of them, and tensors, are known. The
imports they may name are markers, never looked up.
"""

import dataclasses
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from awq_jax.errors import AwqError, CheckpointError, FormatError

MAX_PICKLE = 16 << 20  # bytes of data.pkl: 100 per tensor are usual
MAX_AXES = 8
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch before 1.6 begin
STORAGES = {
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch FloatStorage": np.dtype(np.float32),
    "torch DoubleStorage": np.dtype(np.float64),
}
TENSOR = "torch._utils _rebuild_tensor_v2"
ORDERED = "collections OrderedDict"


@dataclasses.dataclass(frozen=True)
class _Global:
    """An import that the pickle names; only ever compared."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str
    size: int


def load(path: Path) -> object:
    """The object in a file: dictionaries with string keys, lists, tuples, strings, numbers, and arrays.

    Raises:
      FormatError: the file holds something else, such as a call that is not needed for tensors.
      CheckpointError: it is absent or damaged.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(LEGACY))
        if start == LEGACY:
            raise FormatError(
                f"{path} was written in torch's format before 1.6; if you trust it, write it again with a current "
                "torch: torch.save(torch.load(FILE), FILE)"
            )
        with zipfile.ZipFile(path) as archive:
            return _Archive(path, archive).content()
    except AwqError:
        raise
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e}") from e
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, struct.error) as e:
        raise CheckpointError(f"{path} is not a .pt file of torch.save, or damaged: {e}; download it again") from e


class _Archive:
    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self.entries = {info.filename: info for info in archive.infolist()}
        pickles = [n for n in self.entries if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise FormatError(f"{path} holds no object of torch.save")
        self.prefix = pickles[0].removesuffix("data.pkl")
        self.left = path.stat().st_size  # bytes of storages that may still be claimed
        self.storages: dict[str, np.ndarray] = {}

    def content(self) -> object:
        order = f"{self.prefix}byteorder"
        if order in self.entries and self._bytes(order, 16) != b"little":
            raise FormatError(f"{self.path} was written on a big-endian machine")
        pickle = self._bytes(f"{self.prefix}data.pkl", MAX_PICKLE)
        try:
            return _Machine(self).run(pickle)
        except AwqError:
            raise
        except (ValueError, IndexError, KeyError, TypeError) as e:
            raise CheckpointError(f"{self.path} holds a damaged pickle: {type(e).__name__}; download it again") from e

    def _bytes(self, name: str, limit: int) -> bytes:
        info = self.entries.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} lacks {name}; download it again")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
            raise FormatError(f"{self.path}: {name} is compressed or too large ({info.file_size} bytes)")
        return self.archive.read(info)

    def storage(self, storage: _Storage) -> np.ndarray:
        """The numbers of a storage, read once."""
        if storage.key not in self.storages:
            name = f"{self.prefix}data/{storage.key}"
            raw = self._bytes(name, self.left)
            self.left -= len(raw)
            if len(raw) != storage.size * storage.dtype.itemsize:
                raise CheckpointError(
                    f"{self.path}: {name} has {len(raw)} bytes; {storage.size} numbers were announced"
                )
            self.storages[storage.key] = np.frombuffer(raw, storage.dtype)
        found = self.storages[storage.key]
        if found.dtype != storage.dtype or found.size != storage.size:
            raise CheckpointError(f"{self.path}: storage {storage.key!r:.80} is used with two types")
        return found

    def tensor(self, arguments: tuple[Any, ...]) -> np.ndarray:
        """A tensor from the arguments of torch's ``_rebuild_tensor_v2``."""
        storage, offset, shape, strides = arguments[:4]
        lists = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= MAX_AXES
        if not lists or any(type(v) is not int or not 0 <= v < 2**48 for v in (offset, *shape, *strides)):
            raise CheckpointError(f"{self.path} holds a tensor of impossible shape; download it again")
        if not isinstance(storage, _Storage):
            raise CheckpointError(f"{self.path} holds a tensor without storage; download it again")
        flat = self.storage(storage)
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if math.prod(shape) > flat.size or (math.prod(shape) and last >= flat.size):
            raise CheckpointError(f"{self.path} holds a tensor that exceeds its storage; download it again")
        if not math.prod(shape):
            return np.zeros(shape, flat.dtype)
        steps = tuple(s * flat.itemsize for s in strides)
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False).copy()


class _Machine:
    """The stack machine; see the module."""

    def __init__(self, archive: _Archive) -> None:
        self.archive = archive
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> object:
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name == "STOP":
                return self.stack.pop()
            step = _STEPS.get(opcode.name)
            if step is None:
                raise FormatError(
                    f"{self.archive.path} is a pickle with the instruction {opcode.name}, which plain tensors do not "
                    "need; it is not read"
                )
            step(self, argument)
        raise CheckpointError(f"{self.archive.path} holds a pickle without an end; download it again")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def above_mark(self) -> list[object]:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def last(self, count: int) -> tuple[object, ...]:
        if len(self.stack) < count:
            raise IndexError
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def append(self, values: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError
        target.extend(values)

    def set_items(self, values: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(values) % 2 or not all(isinstance(k, str) for k in values[::2]):
            raise TypeError
        target.update(zip(values[::2], values[1::2], strict=True))

    def name(self, argument: str) -> None:
        if argument not in (TENSOR, ORDERED, *STORAGES):
            raise FormatError(
                f"{self.archive.path} is a pickle that wants to import {argument.replace(' ', '.')!r:.200}, which "
                "plain tensors do not need; it is not read"
            )
        self.push(_Global(argument))

    def storage(self, _: None) -> None:
        kind, dtype, key, _, size = self.stack.pop()
        if kind != "storage" or not isinstance(dtype, _Global) or not isinstance(key, str) or type(size) is not int:
            raise TypeError
        if not key.isalnum() or not 0 <= size < 2**48:
            raise ValueError
        self.push(_Storage(STORAGES[dtype.name], key, size))

    def reduce(self, _: None) -> None:
        function, arguments = self.last(2)
        if function == _Global(ORDERED) and arguments == ():
            self.push({})
        elif function == _Global(TENSOR) and isinstance(arguments, tuple):
            self.push(self.archive.tensor(arguments))
        else:
            raise FormatError(f"{self.archive.path} is a pickle with a call other than a tensor's; it is not read")


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, a: None,
    "MARK": lambda m, a: m.marks.append(len(m.stack)),
    "EMPTY_DICT": lambda m, a: m.push({}),
    "EMPTY_LIST": lambda m, a: m.push([]),
    "EMPTY_TUPLE": lambda m, a: m.push(()),
    "NONE": lambda m, a: m.push(None),
    "NEWTRUE": lambda m, a: m.push(True),
    "NEWFALSE": lambda m, a: m.push(False),
    "TUPLE": lambda m, a: m.push(tuple(m.above_mark())),
    "TUPLE1": lambda m, a: m.push(m.last(1)),
    "TUPLE2": lambda m, a: m.push(m.last(2)),
    "TUPLE3": lambda m, a: m.push(m.last(3)),
    "APPEND": lambda m, a: m.append([m.stack.pop()]),
    "APPENDS": lambda m, a: m.append(m.above_mark()),
    "SETITEM": lambda m, a: m.set_items(list(m.last(2))),
    "SETITEMS": lambda m, a: m.set_items(m.above_mark()),
    "GLOBAL": _Machine.name,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.reduce,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, a: m.memo.__setitem__(a, m.stack[-1])),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, a: m.push(m.memo[a])),
    **dict.fromkeys(("BINUNICODE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1"), _Machine.push),
}
