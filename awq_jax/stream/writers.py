"""What the processes of a streamed quantization write: parts by turns, and the manifest by the first of them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from awq_jax.convert.files import manifest
from awq_jax.convert.files.manifest import Manifest
from awq_jax.convert.format import Record
from awq_jax.devices.pool import Pool
from awq_jax.devices.team import Team
from awq_jax.errors import ConfigError
from awq_jax.stream import parts
from awq_jax.stream.job import FINISHED, HIDDEN, OUT, Job
from awq_jax.stream.parts import Tensors


def agree(pool: Pool, job: Job) -> None:
    """See that all processes are to do the same.

    Raises:
      ConfigError: naming what differs.
      ProcessError: another process has ended.
    """
    texts = pool.meet(json.dumps(job.identity | {"target": str(job.path), "options": repr(job.options)}))
    first = json.loads(texts[0])
    for rank, text in enumerate(texts):
        here = json.loads(text)
        if differs := [what for what in first if first[what] != here[what]]:
            raise ConfigError(f"process {rank} has other {' and other '.join(differs)} than process 0; start all alike")


@contextlib.contextmanager
def opened(pool: Pool, job: Job) -> Iterator[Manifest]:
    """The manifest: in process 0 the file, in the others what stands in it."""
    if pool.rank:
        done = Manifest(io.StringIO(), job.work)
        records, done.shards, done.notes = json.loads(pool.meet()[0])
        done.records = [_record(r) for r in records]
        yield done
    else:
        with manifest.opened(job.work, job.fingerprint, {HIDDEN, OUT, FINISHED}) as done:
            pool.meet(json.dumps([[dataclasses.asdict(r) for r in done.records], done.shards, done.notes]))
            yield done


class PartWriter(Protocol):
    """Writes one part while the next is made; the last is on the disk when the context ends."""

    def __enter__(self) -> PartWriter: ...
    def __exit__(self, *exc: Any) -> None: ...
    def put(self, number: int, tensors: Tensors, note: dict[str, Any]) -> None:
        """Start writing a part, when the one before is on the disk."""


def writer(job: Job, done: Manifest) -> PartWriter:
    """One for all processes, or one that takes its turn."""
    team = job.session.pool.team
    return Writer(job, done) if team is None else TurnWriter(job, done, team)


class Writer:
    """Writes one part while the next is made."""

    def __init__(self, job: Job, done: Manifest) -> None:
        self._job, self._done = job, done
        self._pool = ThreadPoolExecutor(1, "write")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            self._wait()
        except OSError:
            if kind is None:  # otherwise there is an older error to report
                raise
        finally:
            self._pool.shutdown()

    def put(self, number: int, tensors: Tensors, note: dict[str, Any]) -> None:
        """Start writing a part, when the one before is on the disk."""
        self._wait()
        self._pending = self._pool.submit(parts.write_part, self._done, self._job.work, number, tensors, note)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


class TurnWriter:
    """As `Writer`, in each of several processes: part ``number`` is written by process ``number`` modulo their number.

    Its line comes into the manifest when all have met after that, so that the part is there. All have the
    same parts in memory.
    """

    def __init__(self, job: Job, done: Manifest, team: Team) -> None:
        self._job, self._done, self._team = job, done, team
        self._pool = ThreadPoolExecutor(1, "write")
        self._pending: Future[tuple[list[Record], list[str]]] | None = None
        self._last: tuple[int, dict[str, Any]] | None = None

    def __enter__(self) -> TurnWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                self._settle()
        finally:
            self._pool.shutdown()

    def put(self, number: int, tensors: Tensors, note: dict[str, Any]) -> None:
        self._settle()
        self._last = number, note
        if number % self._team.size == self._team.rank:
            self._pending = self._pool.submit(parts.write_tensors, self._job.work, number, tensors)

    def _settle(self) -> None:
        if self._last is None:
            return
        (number, note), self._last = self._last, None
        pending, self._pending = self._pending, None
        text = ""
        if pending is not None:
            made, names = pending.result()
            text = json.dumps([[dataclasses.asdict(r) for r in made], names])
        told, names = json.loads(self._team.gather(text)[number % self._team.size])
        records = [_record(r) for r in told]
        if not self._team.rank:
            self._done.add(number, records, names, note)
        parts.take(self._done, records, names, note)


def _record(fields: dict[str, Any]) -> Record:
    return Record(**{**fields, "shape": tuple(fields["shape"])})
