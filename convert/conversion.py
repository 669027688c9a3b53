"""`checkpoint`: any format to any other, tensor by tensor, resumable and all or nothing."""

import dataclasses
import errno
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from numpy.typing import DTypeLike

from awq_jax.convert import float_form, head, pipeline, registry
from awq_jax.convert.files import manifest
from awq_jax.convert.files.shards import ShardWriter, install
from awq_jax.convert.format import Destination, Encoder, Format, Record
from awq_jax.convert.source import Source
from awq_jax.convert.writing import check_path, encoder_of, finish, into_sink, refuse_source
from awq_jax.dtypes import FLOATS, name_of
from awq_jax.errors import AwqError, CheckpointError

log = logging.getLogger(__name__)

WORKERS = 4  # at most, by default: reading and writing are as slow as encoding then
SPARE = 64 << 20  # bytes left free on the disk


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
      source, target: formats.
      records: every tensor written.
      seconds: of this run.
      resumed: tensors that an earlier, interrupted run had written.
    """

    source: str
    target: str
    records: tuple[Record, ...]
    seconds: float
    resumed: int = 0

    @property
    def nbytes(self) -> int:
        """Tensor bytes written."""
        return sum(r.nbytes for r in self.records)

    @property
    def inexact(self) -> tuple[Record, ...]:
        """Tensors that moved, the worst first."""
        return tuple(sorted((r for r in self.records if r.deviation), key=lambda r: -r.deviation))


def checkpoint(
    src: str | Path | Source,
    dst: str | Path,
    to: str,
    *,
    dtype: DTypeLike | None = None,
    allow_lossy: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = 512 << 20,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Convert a checkpoint. Memory: one shard and ``workers + 1`` tensors.

    The result is built in a hidden directory beside ``dst`` and renamed at the end. If the run is
    killed, the same call continues after the last finished shard and ends with the same bytes.

    Args:
      src: a directory, ``.gguf`` file or hub id in any readable format, or an open source.
      dst: directory to create (for GGUF: a file that ends in ``.gguf``).
      to: a name in `awq_jax.convert.registry.FORMATS`.
      dtype: of float tensors, ``"float32"``, ``"bfloat16"`` or ``"float16"``. Default: as stored, and
        float32 for packed weights that are stored dequantized, which is exact.
      allow_lossy: store weights that the format cannot hold exactly as near as it can.
      overwrite: replace ``dst`` if it is a checkpoint.
      max_shard_bytes: bound on the tensor bytes of one file.
      workers: tensors encoded at a time.
      progress: called with the bytes read and those to read in all.

    Returns:
      What was written, and how far each tensor moved.

    Raises:
      FormatError: a format is unknown, or a tensor does not fit (named, with the remedy).
      CheckpointError: ``src`` is damaged, ``dst`` exists, or the disk is full or refuses.
      WeightError: a tensor holds NaN or inf.
      ConfigError: an argument is out of range.
    """
    start = time.perf_counter()
    format = registry.get(to)
    name = name_of(dtype)
    path = Path(os.path.abspath(Path(dst).expanduser()))
    check_path(path, format, overwrite)
    source = registry.open_source(src, packed=True) if isinstance(src, str | Path) else src
    refuse_source(path, source)
    if to == "float":
        source = float_form.of(source)
    encoder = encoder_of(to, Destination(config=source.config, dtype=name))
    job = _Job(source, format, encoder, allow_lossy, workers or min(WORKERS, os.cpu_count() or 1), progress)
    run = _to_sink if format.sink else _to_directory
    try:
        records, resumed = run(job, path, overwrite, max_shard_bytes)
    except OSError as e:
        remedy = "Free some space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "Repair what that names"
        raise CheckpointError(f"cannot write {path}: {e}. {remedy} and run the same command again") from e
    return Conversion(source.format, to, tuple(records), time.perf_counter() - start, resumed)


@dataclasses.dataclass
class _Job:
    source: Source
    format: Format
    encoder: Encoder
    lossy: bool
    workers: int
    progress: Callable[[int, int], None] | None

    def names(self) -> list[str]:
        """What is written: all tensors but a head that is the embedding."""
        names = self.source.names()
        left_out = head.copies(self.source.config, names)
        return [n for n in names if n not in left_out]

    def encoded(self, skip: frozenset[str] = frozenset()) -> Iterator[pipeline.EncodedTensor]:
        """All tensors that are not in ``skip``, encoded."""
        names = sorted(self.names(), key=_natural)
        sizes = {n: self.source.info(n).nbytes for n in names}
        total, read = sum(sizes.values()), sum(sizes[n] for n in skip if n in sizes)
        left = (n for n in names if n not in skip)
        for encoded in pipeline.run(self.encoder, left, self.source.read, self.lossy, self.workers):
            yield encoded
            read += sizes[encoded.record.name]
            if self.progress is not None:
                self.progress(read, total)

    def estimate(self) -> int:
        """Bytes the result will take, roughly (from above)."""
        total, dtype = 0, self.encoder.destination.dtype
        for name in self.names():
            info = self.source.info(name)
            elements = math.prod(info.shape)
            if (info.packed is None and dtype) or (info.packed and self.format.name == "float"):
                total += elements * FLOATS[dtype or "float32"].itemsize
            else:
                total += info.nbytes
        return total


def _to_directory(job: _Job, path: Path, overwrite: bool, max_shard_bytes: int) -> tuple[list[Record], int]:
    """Shards of safetensors in a working directory that survives a crash."""
    work = path.parent / f".{path.name}.converting"
    dtype = job.encoder.destination.dtype
    settings = {"to": job.format.name, "dtype": dtype, "lossy": job.lossy, "shard": max_shard_bytes}
    with manifest.opened(work, manifest.fingerprint(job.source, **settings)) as done:
        records, resumed = list(done.records), len(done.records)
        _check_space(path, job.estimate() - sum(r.nbytes for r in records))
        new: list[pipeline.EncodedTensor] = []

        def on_shard(number: int) -> None:
            done.add(number, [e.record for e in new], [name for e in new for name in e.arrays])
            new.clear()

        try:
            writer = ShardWriter(work, max_shard_bytes, done.shards, on_shard)
            for encoded in job.encoded(frozenset(r.name for r in records)):
                writer.add(encoded.arrays, encoded.metadata)  # may finish the shard of those before it
                new.append(encoded)
                records.append(encoded.record)
            finish(job.format.name, work, writer, job.encoder, records, None, job.source)
            (work / manifest.NAME).unlink()
            install(work, path, overwrite)
        except AwqError:  # running it again would end the same way
            shutil.rmtree(work, ignore_errors=True)
            raise
    return records, resumed


def _to_sink(job: _Job, path: Path, overwrite: bool, max_shard_bytes: int) -> tuple[list[Record], int]:
    """A container of its own: all of it in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_space(path, job.estimate())
    return into_sink(job.format, path, job.source, job.encoder, job.encoded(), overwrite), 0


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed + SPARE:
        raise CheckpointError(
            f"{path.parent} has {free / 1e9:.2f} GB free, and the result needs about {needed / 1e9:.2f} GB; free some "
            "space or choose another disk"
        )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]
