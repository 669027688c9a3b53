"""What an unfinished conversion has done so far: a JSON line per finished shard, locked while in use."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO

from awq_jax.convert.config_json import JsonObject
from awq_jax.convert.files.companions import TEMPLATES
from awq_jax.convert.files.shards import part_name
from awq_jax.convert.format import Record
from awq_jax.convert.source import Source, path_of
from awq_jax.errors import CheckpointError

log = logging.getLogger(__name__)

NAME = "manifest.jsonl"


class Manifest:
    """The manifest of a working directory.

    Attributes:
      records: what earlier runs have written, in order.
      shards: tensor names of the shards they have finished.
      notes: what else was noted of each of those shards.
    """

    def __init__(self, file: IO[str], directory: Path) -> None:
        self._file, self._directory = file, directory
        self.records: list[Record] = []
        self.shards: list[list[str]] = []
        self.notes: list[JsonObject] = []

    def add(self, number: int, records: Sequence[Record], names: Sequence[str], note: JsonObject | None = None) -> None:
        """Shard ``number`` is on disk; ``note``: plain JSON data to keep with it."""
        size = (self._directory / part_name(number)).stat().st_size
        line = {"bytes": size, "names": list(names), "records": [dataclasses.asdict(r) for r in records]}
        line |= {"note": note} if note else {}
        self._write(line)

    def _write(self, line: JsonObject) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, fingerprint: str) -> bool:
        """Take over what is there; False if it belongs to another job."""
        self._file.seek(0)
        lines = self._file.read().split("\n")[:-1]  # what no newline ends was cut off
        good = 0
        try:
            if not lines or json.loads(lines[0]) != {"fingerprint": fingerprint}:
                return False
            good = len(lines[0]) + 1
            for number, text in enumerate(lines[1:]):
                line = json.loads(text)
                path = self._directory / part_name(number)
                if not path.is_file() or path.stat().st_size != line["bytes"]:
                    break
                records = list(map(Record.from_json, line["records"]))
                self.shards.append(line["names"])
                self.records += records
                self.notes.append(line.get("note", {}))
                good += len(text) + 1
        except (ValueError, KeyError, TypeError):  # a line damaged by a crash
            if not good:
                return False
        self._file.seek(0)
        self._file.truncate(good)
        self._file.seek(0, os.SEEK_END)
        return True


@contextlib.contextmanager
def opened(directory: Path, fingerprint: str, keep: Collection[str] = ()) -> Iterator[Manifest]:
    """The manifest of ``directory``, which is made, or emptied if it was left by another job.

    Args:
      directory: where shards are written.
      fingerprint: of the job.
      keep: names in ``directory`` that stay besides the manifest and the finished shards.

    Raises:
      CheckpointError: if another process is at work there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / NAME).open("a+", encoding="ascii", errors="replace", newline="\n") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise CheckpointError(f"another process is writing {directory}; wait for it, or take another target") from e
        manifest = Manifest(file, directory)
        if not manifest._read(fingerprint):
            manifest, keep = Manifest(file, directory), ()
            file.truncate(0)
            manifest._write({"fingerprint": fingerprint})
        known = {NAME, *keep, *(part_name(i) for i in range(len(manifest.shards)))}
        for path in directory.iterdir():
            if path.name not in known:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if manifest.shards:
            log.info("continuing with shard %d of an earlier run", len(manifest.shards) + 1)
        yield manifest


def written_for(directory: Path) -> str | None:
    """The fingerprint of the job that left ``directory``, or None if nothing usable is there."""
    try:
        with (directory / NAME).open(encoding="ascii", errors="replace") as file:
            return str(json.loads(file.readline())["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fingerprint(source: Source, **settings: object) -> str:
    """Identifies a job: its source files and everything that decides the output.

    Files are told apart by name, size and time of change: one that was only touched counts as another; one
    whose bytes were changed and whose time was then set back, or not kept by the file system, does not.
    """
    where = path_of(source)
    assert where is not None
    files = sorted((*where.iterdir(), *where.glob(f"{TEMPLATES}/*"))) if where.is_dir() else [where]
    state = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    identity = getattr(source, "identity", "")  # of a source that changes what the files hold
    text = json.dumps([state, identity, sorted((k, str(v)) for k, v in settings.items())])
    return hashlib.sha256(text.encode()).hexdigest()
