"""Finished blocks on disk, and the checkpoint made of them.

A block is written as it is in memory (our own format, which holds everything), in a file of its own: a part. The
format of the result is chosen when all are there, as `awq_jax.serve.model.Model.save` chooses it: by what holds every
weight. With several processes each writes some of the parts, and the first keeps the manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from awq_jax.convert import card, float_form, pipeline, writing
from awq_jax.convert.files import manifest
from awq_jax.convert.files.manifest import Manifest
from awq_jax.convert.files.safetensors import INDEX
from awq_jax.convert.files.shards import ShardWriter, install, part_name, write_file, write_json
from awq_jax.convert.format import Destination, Record
from awq_jax.convert.formats import native
from awq_jax.convert.source import Source
from awq_jax.errors import FormatError
from awq_jax.models.weights import modules
from awq_jax.models.weights.params import Weights
from awq_jax.qtensor import QuantizedTensor, Weight
from awq_jax.stream.decoder_blocks import DecoderBlock, Leaves
from awq_jax.stream.job import ALLOCATION, FINISHED, HIDDEN, OUT, Job
from awq_jax.stream.session import Note

log = logging.getLogger(__name__)

Tensors = Iterable[tuple[str, np.ndarray | QuantizedTensor]]
Written = tuple[list[Record], list[str]]  # of a part: what was made of its tensors, and their names in the file


@contextlib.contextmanager
def opened(job: Job) -> Iterator[Manifest]:
    """The manifest: in process 0 the file, in the others what stands in it."""
    pool = job.session.pool
    if pool.rank:
        done = Manifest(io.StringIO(), job.work)
        records, done.shards, done.notes = json.loads(pool.meet()[0])
        done.records = list(map(Record.from_json, records))
        yield done
    else:
        with manifest.opened(job.work, job.fingerprint(), {ALLOCATION, HIDDEN, OUT, FINISHED}) as done:
            pool.meet(json.dumps([[dataclasses.asdict(r) for r in done.records], done.shards, done.notes]))
            yield done


class PartWriter:
    """Writes one part while the next is made; the last is on the disk when the context ends.

    Of several processes, part ``number`` is written by process ``number`` modulo their number, and its line comes
    into the manifest when all have met after that. All have the same parts in memory.
    """

    def __init__(self, job: Job, done: Manifest) -> None:
        self._work, self._done, self._team = job.work, done, job.session.pool.team
        self._thread = ThreadPoolExecutor(1, "write")
        self._pending: tuple[int, Note, Future[Written] | None] | None = None

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None or self._team is None:
                self._settle()
        except OSError:
            if kind is None:  # otherwise there is an older error to report
                raise
        finally:
            self._thread.shutdown()

    def put(self, number: int, tensors: Tensors, note: Note) -> None:
        """Start writing a part, when the one before is on the disk."""
        self._settle()
        own = self._team is None or number % self._team.size == self._team.rank
        writing = self._thread.submit(self._write, number, tensors, note) if own else None
        self._pending = number, note, writing

    def _write(self, number: int, tensors: Tensors, note: Note) -> Written:
        written = write_tensors(self._work, number, tensors)
        if self._team is None:  # at once: what is on the disk is not made again
            self._add(number, written, note)
        return written

    def _settle(self) -> None:
        """Wait for the part before, which then stands in the manifest."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        number, note, writing = pending
        written = writing.result() if writing is not None else None
        if self._team is None:
            return
        text = json.dumps([[dataclasses.asdict(r) for r in written[0]], written[1]]) if written is not None else ""
        records, names = json.loads(self._team.gather(text)[number % self._team.size])
        self._add(number, (list(map(Record.from_json, records)), names), note)

    def _add(self, number: int, written: Written, note: Note) -> None:
        records, names = written
        if self._team is None or not self._team.rank:
            self._done.add(number, records, names, note)
        self._done.records += records
        self._done.shards.append(names)
        self._done.notes.append(note)


def write_tensors(work: Path, number: int, tensors: Tensors) -> Written:
    """Write a block's tensors into the file of its part, to the disk."""
    encoder = native.NativeEncoder()
    arrays: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    records: list[Record] = []
    for name, value in tensors:
        encoded = pipeline.encode(encoder, name, value, lossy=False)
        arrays |= encoded.arrays
        metadata |= encoded.metadata
        records.append(encoded.record)
    write_file(work / part_name(number), arrays, metadata)
    return records, list(arrays)


def read_back(job: Job, done: Manifest, first: int) -> Callable[[DecoderBlock], Leaves]:
    """Reads what has been made of a block that is done: its parameters by path within it, packed ones as floats.

    Args:
      first: number of the first block that will be asked for.
    """
    blocks = job.session.blocks[first : len(done.shards)]
    source = _source(job, done, range(first, first + len(blocks))) if blocks and job.session.sequential else None
    shapes = {b.prefix + p: b.leaves[p] for b in blocks for p in b.owned}

    def read(block: DecoderBlock) -> Leaves:
        assert source is not None
        weights = Weights(source, job.session.chain.config, shapes)
        out: dict[str, Weight] = {}
        for path in block.owned:
            leaf = weights.leaf(block.prefix + path)
            dtype = job.weights.dtype_of(block.prefix + path)
            out[path] = leaf.dequantize(dtype) if isinstance(leaf, QuantizedTensor) else leaf.astype(dtype)
        return out

    return read


def _source(job: Job, done: Manifest, numbers: Iterable[int]) -> native.NativeSource:
    """The tensors of some parts."""
    files = {name: part_name(i) for i in numbers for name in done.shards[i]}
    write_json(job.work / INDEX, {"weight_map": files})
    return native.NativeSource(job.work, {"quantization_config": {"format_version": native.VERSION}})


def finish(job: Job, done: Manifest) -> tuple[str, str]:
    """Put the checkpoint made of all parts in its place: its format, and why it is not the one asked for."""
    if job.installed():
        return str(json.loads((job.work / FINISHED).read_text())["format"]), ""
    (job.work / FINISHED).unlink(missing_ok=True)
    problem = ""
    try:
        format = assemble(job, done, job.options.format)
    except FormatError as e:
        problem = str(e)
        format = assemble(job, done, native.QUANT_METHOD)
    write_json(job.work / FINISHED, {"format": format})
    install(job.work / OUT, job.path, job.options.overwrite)
    return format, problem


def assemble(job: Job, done: Manifest, format: str) -> str:
    """Make a checkpoint of all parts, in the working directory.

    Args:
      format: a name, or ``"auto"``.

    Returns:
      The format written.

    Raises:
      FormatError: the format cannot hold a tensor.
    """
    parts = _source(job, done, range(len(done.shards)))
    report = job.session.report(filter(None, done.notes), job.batches)
    report.calibration = job.description
    destination = Destination(
        config=job.source.config,
        settings=job.session.settings,
        made=card.of_report(report),
        scales=modules.folded_scales(report.scales, job.session.chain.config),
    )
    names = [r.name for r in done.records]
    reasons = []
    choices = writing.auto_formats(job.source.config) if format == "auto" else (format,)
    for choice in choices:
        try:
            _write_checkpoint(choice, parts, names, job.work / OUT, destination, job.source, strict=format == "auto")
        except FormatError as e:
            if format != "auto" or choice == choices[-1]:
                raise
            reasons.append(str(e))
        else:
            log.info("wrote %s%s", choice, writing.because(reasons))
            return choice
    raise AssertionError("the last format holds everything")


def _write_checkpoint(
    format: str,
    parts: native.NativeSource,
    names: list[str],
    out: Path,
    destination: Destination,
    source: Source,
    strict: bool,
) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    encoder = writing.encoder_of(format, destination)
    records: list[Record] = []
    writer = ShardWriter(out, writing.SHARD, spool=True)
    tensors = ((name, parts.read(name)) for name in names)
    for name, value in float_form.FloatForm(destination.config).all_of(tensors) if format == "float" else tensors:
        encoded = pipeline.encode(encoder, name, value, lossy=False)
        if strict and isinstance(value, QuantizedTensor) and not encoded.record.bits:
            raise FormatError(f"{name} is packed, and {format} would hold it as float")
        writer.add(encoded.arrays, encoded.metadata)
        records.append(encoded.record)
        del value, encoded
    writing.finish(format, out, writer, encoder, records, None, source)
