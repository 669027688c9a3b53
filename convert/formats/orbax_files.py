"""The files of an Orbax checkpoint: a tree of arrays read one at a time, and written from one spool file."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

import numpy as np

from awq_jax.convert.config_json import HfConfig, JsonObject
from awq_jax.convert.files.safetensors import DTYPES, Entry, TensorFiles, read_json
from awq_jax.convert.files.shards import raw_bytes, write_json
from awq_jax.convert.formats.native import KEY, VERSION
from awq_jax.errors import BackendError, CheckpointError

NAMED = {dtype.name: dtype for dtype in DTYPES.values()}
PARAMS = "params"
STATIC = "awq-jax.json"
SPOOL = "spool.bin"
ALIGN = 64  # bytes; of arrays in the spool
BOMB = 256  # arrays together are at most this many times larger than their files: zstd makes zeros that small


def holds_params(directory: Path) -> bool:
    """Whether a directory looks like one of these checkpoints."""
    return (directory / PARAMS / "_METADATA").is_file()


def is_path(name: str) -> bool:
    """Whether a name, with dots between keys, can be a place in a tree and a directory of its own."""
    return bool(name) and "" not in name.split(".") and not set(name) & set("/\\\0") and len(name.encode()) < 250


class OrbaxFiles(TensorFiles):
    """The arrays of a checkpoint by name.

    Names, shapes and dtypes come from the file beside Orbax's directory, and an array must agree with
    it before it is read: zarr pads and compresses, so its files do not bound what it claims to hold.

    Raises:
      CheckpointError: the files are absent or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / PARAMS
        if not holds_params(directory) or not (directory / STATIC).is_file():
            raise CheckpointError(f"{directory} has no {PARAMS}/_METADATA and {STATIC}; it is not an Orbax checkpoint")
        _refuse_links(self._path)
        static = read_json(directory / STATIC)
        packed, arrays = static.get("packed"), static.get("arrays")
        if not (_objects(packed) and _objects(arrays)):
            raise CheckpointError(f"{directory / STATIC} lacks its objects 'packed' and 'arrays'; write it again")
        self.metadata = {STATIC: {KEY + name: json.dumps(info) for name, info in packed.items()}}
        self.entries = {name: self._entry(name, info) for name, info in arrays.items()}
        total = sum(e.nbytes for e in self.entries.values())
        stored = sum(f.stat().st_size for f in self._path.rglob("*") if f.is_file())
        if total > BOMB * stored:
            raise CheckpointError(f"{self._path} claims {total} bytes of arrays and has {stored}; write it again")

    def _entry(self, name: str, info: HfConfig) -> Entry:
        """An array's shape and dtype."""
        dtype, shape = info.get("dtype"), info.get("shape")
        sizes = isinstance(shape, list) and all(type(d) is int and 0 <= d < 2**40 for d in shape) and len(shape) <= 32
        if not sizes or not isinstance(dtype, str) or dtype not in NAMED or not is_path(name):
            raise CheckpointError(
                f"{self.directory / STATIC}: array {name[:200]!r} is {str(info)[:200]}; write it again"
            )
        assert isinstance(shape, list)
        return Entry(self._path / name, NAMED[dtype], tuple(shape), 0, math.prod(shape) * NAMED[dtype].itemsize)

    def read(self, name: str) -> np.ndarray:
        """One array, by TensorStore; the others are not touched.

        Raises:
          CheckpointError: if it is absent or damaged.
          BackendError: TensorStore, a part of Orbax, is not installed.
        """
        entry = self.entry(name)
        orbax()
        import tensorstore  # a part of Orbax

        store = {"driver": "file", "path": str(entry.file)}
        spec = {"driver": "zarr", "kvstore": store, "fill_missing_data_reads": False}
        with _explained(entry.file):
            array = tensorstore.open(spec, read=True).result()
            got = tuple(array.shape), array.dtype.numpy_dtype
            if got != (entry.shape, entry.dtype):
                raise CheckpointError(f"{entry.file} is {got[1]} {got[0]}; {STATIC} says {entry.dtype} {entry.shape}")
            return np.asarray(array.read().result())


class Spool:
    """Arrays in one file, until Orbax gets all of them as a tree of memory maps: it saves a tree at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._places: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}
        self._static: JsonObject = {}
        self._end = 0
        (directory / SPOOL).touch()

    def add(self, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None) -> None:
        """Take arrays, and what `awq_jax.convert.formats.native` says of them.

        Raises:
          CheckpointError: a name is given twice or is no path.
        """
        with (self._directory / SPOOL).open("ab") as f:
            for name, array in arrays.items():
                if name in self._places:
                    raise CheckpointError(f"array {name!r} was given twice; every name is written once")
                if not is_path(name):
                    raise CheckpointError(f"array {name!r} cannot be a path in an Orbax tree; rename it")
                self._places[name] = self._end, array.dtype, array.shape
                f.write(raw_bytes(array))
                f.write(bytes(-array.nbytes % ALIGN))
                self._end += array.nbytes + -array.nbytes % ALIGN
        self._static |= {k.removeprefix(KEY): json.loads(v) for k, v in (metadata or {}).items()}

    def close(self) -> None:
        """Write the tree and its static fields, and remove the spool.

        Raises:
          CheckpointError: the names make no tree, or the disk refuses.
        """
        spool = self._directory / SPOOL
        whole = np.memmap(spool, np.uint8, "r") if self._end else np.zeros(0, np.uint8)
        arrays = {}
        for name, (begin, dtype, shape) in self._places.items():
            size = int(np.prod(shape)) * dtype.itemsize
            arrays[name] = np.asarray(whole[begin : begin + size]).view(dtype).reshape(shape)
        path = self._directory / PARAMS
        with _handler() as handler, _explained(path):
            handler.save(path, orbax().args.PyTreeSave(nested(arrays)))
        sizes = {n: {"dtype": a.dtype.name, "shape": list(a.shape)} for n, a in arrays.items()}
        write_json(self._directory / STATIC, {"format_version": VERSION, "packed": self._static, "arrays": sizes})
        del whole, arrays
        spool.unlink()


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Names with dots as nested dicts.

    Raises:
      CheckpointError: if one name is the beginning of another.
    """
    out: dict[str, Any] = {}
    for name, value in flat.items():
        *above, last = name.split(".")
        at = out
        for key in above:
            at = at.setdefault(key, {})
            if not isinstance(at, dict):
                raise CheckpointError(f"{name} lies below another tensor, which a tree cannot hold; save as 'awq-jax'")
        if last in at:
            raise CheckpointError(f"{name} lies above another tensor, which a tree cannot hold; save as 'awq-jax'")
        at[last] = value
    return out


def _objects(value: object) -> TypeGuard[dict[str, JsonObject]]:
    return isinstance(value, dict) and all(isinstance(v, dict) for v in value.values())


def _refuse_links(path: Path) -> None:
    """What Orbax would follow without asking."""
    for root, folders, files in os.walk(path):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(root, name)):
                raise CheckpointError(f"{root}/{name} is a link, which no Orbax checkpoint has; copy the file there")


def orbax() -> ModuleType:
    """``orbax.checkpoint``.

    Raises:
      BackendError: if it is not installed.
    """
    try:
        import orbax.checkpoint as ocp  # optional, and takes seconds
    except ImportError as e:
        raise BackendError(f"Orbax checkpoints need a missing package: pip install orbax-checkpoint ({e})") from e
    return ocp


@contextlib.contextmanager
def _handler() -> Iterator[Any]:
    """A checkpointer of trees that neither copies arrays before it writes them nor talks."""
    import jax

    ocp = orbax()
    kinds = ocp.type_handlers
    # One zarr directory per array: the single database that is Orbax's default is built in memory.
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        type_handler_registry=kinds.create_type_handler_registry(
            (np.ndarray, kinds.NumpyHandler(deepcopy_host_arrays=False)), (jax.Array, kinds.ArrayHandler())
        ),
    )
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            yield checkpointer
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever Orbax, zarr and TensorStore raise, as one of ours: they have no common class."""
    try:
        yield
    except (CheckpointError, BackendError):
        raise
    except Exception as e:
        problem = (str(e).strip().splitlines() or [""])[0]
        raise CheckpointError(f"{path} is damaged or cannot be written: {type(e).__name__}: {problem[:300]}") from e
