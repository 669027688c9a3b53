"""The files of an Orbax checkpoint: a tree of arrays read one at a time, and written from one spool file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax.convert.native import KEY, VERSION
from awq_jax.convert.safetensors_io import DTYPES, Entry, read_json
from awq_jax.convert.shards import write_json
from awq_jax.errors import BackendError, CheckpointError

PARAMS = "params"
STATIC = "awq-jax.json"
SPOOL = "spool.bin"
ALIGN = 64  # bytes; of arrays in the spool
BOMB = 256  # arrays together are at most this many times larger than their files: zstd makes zeros that small


def holds_params(directory: Path) -> bool:
    """Whether a directory looks like one of these checkpoints."""
    return (directory / PARAMS / "_METADATA").is_file()


class OrbaxFiles:
    """The arrays of a checkpoint by name; has the interface of `SafetensorsDir`.

    Raises:
      CheckpointError: the files are absent or damaged.
      BackendError: Orbax is not installed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / PARAMS
        if not holds_params(directory) or not (directory / STATIC).is_file():
            raise CheckpointError(f"{directory} has no {PARAMS}/_METADATA and {STATIC}; it is not an Orbax checkpoint")
        _refuse_links(self._path)
        static = read_json(directory / STATIC).get("packed")
        if not isinstance(static, dict) or not all(isinstance(v, dict) for v in static.values()):
            raise CheckpointError(f"{directory / STATIC} has no object 'packed'; write the checkpoint again")
        self.metadata = {STATIC: {KEY + name: json.dumps(info) for name, info in static.items()}}
        with _handler() as handler, _explained(self._path):
            tree = handler.metadata(self._path).item_metadata.tree
        self.entries: dict[str, Entry] = {}
        self._keys: dict[str, tuple[str, ...]] = {}
        for keys, leaf in _leaves(tree):
            name = ".".join(keys)
            shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
            if name in self.entries or shape is None or dtype is None or np.dtype(dtype) not in DTYPES.values():
                raise CheckpointError(f"{self._path}: {name[:200]!r} is not an array, or stored twice; write it again")
            self._keys[name] = keys
            size = int(np.prod([int(d) for d in shape], dtype=object)) * np.dtype(dtype).itemsize
            self.entries[name] = Entry(self._path, np.dtype(dtype), tuple(int(d) for d in shape), 0, size)
        total = sum(e.nbytes for e in self.entries.values())
        stored = sum(f.stat().st_size for f in self._path.rglob("*") if f.is_file())
        if total > BOMB * stored:
            raise CheckpointError(f"{self._path} claims {total} bytes of arrays and has {stored}; write it again")

    def names(self) -> list[str]:
        """Array names, sorted."""
        return sorted(self.entries)

    def entry(self, name: str) -> Entry:
        """Shape and dtype of an array.

        Raises:
          CheckpointError: if there is no such array.
        """
        if name not in self.entries:
            raise CheckpointError(f"no array {name!r} in {self._path}")
        return self.entries[name]

    def read(self, name: str) -> np.ndarray:
        """One array; the others are not read.

        Raises:
          CheckpointError: if it is absent or damaged.
        """
        entry = self.entry(name)
        item: Any = 0
        for key in reversed(self._keys[name]):
            item = {key: item}
        with _handler() as handler, _explained(self._path):
            value = handler.restore(self._path, orbax().args.PyTreeRestore(item=item, partial_restore=True))
        for key in self._keys[name]:
            value = value[key]
        value = np.asarray(value)
        if value.shape != entry.shape or value.dtype != entry.dtype:
            raise CheckpointError(f"{self._path}: {name} is {value.dtype} {value.shape}; write the checkpoint again")
        return value


class Spool:
    """Arrays in one file, until Orbax gets all of them as a tree of memory maps: it saves a tree at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._places: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}
        self._static: dict[str, Any] = {}
        self._end = 0
        (directory / SPOOL).touch()

    def add(self, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None) -> None:
        """Take arrays, and what `awq_jax.convert.native` says of them.

        Raises:
          CheckpointError: a name is given twice or is no path.
        """
        with (self._directory / SPOOL).open("ab") as f:
            for name, array in arrays.items():
                if name in self._places:
                    raise CheckpointError(f"array {name!r} was given twice; every name is written once")
                if "" in name.split(".") or "/" in name or "\0" in name:
                    raise CheckpointError(f"array {name!r} cannot be a path in an Orbax tree; rename it")
                self._places[name] = self._end, array.dtype, array.shape
                f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
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
        write_json(self._directory / STATIC, {"format_version": VERSION, "packed": self._static})
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


def _leaves(tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """``(keys, leaf)`` of a nested dict."""
    if not isinstance(tree, Mapping):
        yield above, tree
        return
    for key, value in tree.items():
        if not isinstance(key, str) or "." in key:
            raise CheckpointError(f"the Orbax tree has the key {key!r:.100}; of awq_jax's checkpoints none has")
        yield from _leaves(value, (*above, key))


def _refuse_links(path: Path) -> None:
    """What Orbax would follow without asking."""
    for root, folders, files in os.walk(path):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(root, name)):
                raise CheckpointError(f"{root}/{name} is a link, which no Orbax checkpoint has; copy the file there")


def orbax() -> Any:
    """``orbax.checkpoint``.

    Raises:
      BackendError: if it is not installed.
    """
    try:
        import orbax.checkpoint as ocp
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
