"""`quantize_checkpoint`: a checkpoint of any size, one block at a time, resumable.

While a block is calibrated and quantized, one thread reads the next block and another writes the one
before. What survives a crash: a directory beside the new checkpoint with a part for each finished block and a
manifest (see `awq_jax.convert.files.manifest`), and, if they are kept on disk, the hidden states that came out
of the last one.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from awq_jax.config import SAMPLES, SEQ_LEN, Budget
from awq_jax.convert.files.manifest import Manifest
from awq_jax.convert.source import Source
from awq_jax.data import CalibrationSource
from awq_jax.devices import host_memory
from awq_jax.devices.pool import pool_of
from awq_jax.devices.team import team
from awq_jax.dtypes import name_of
from awq_jax.errors import CheckpointError, ConfigError, FormatError, Setting
from awq_jax.models.weights import naming
from awq_jax.models.weights import params as model_params
from awq_jax.progress import Bar, Progress, bar
from awq_jax.qtensor import QuantizedTensor
from awq_jax.quantizer import advice
from awq_jax.report import Report
from awq_jax.stream import budgeted, parts
from awq_jax.stream.decoder_blocks import DecoderBlock, Leaves
from awq_jax.stream.job import Job, Options, prepare


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
      report: weight by weight, over all runs that made this checkpoint.
      format: written.
      resumed: blocks that earlier, interrupted runs had finished.
    """

    report: Report
    format: str
    resumed: int = 0


def quantize_checkpoint(
    src: str | Path | Source,
    dst: str | Path,
    calib: CalibrationSource | None = None,
    *,
    samples: int = SAMPLES,
    seq_len: int = SEQ_LEN,
    batch_size: int | None = None,
    seed: int = 0,
    column: str | None = None,
    bos: str = "auto",
    dtype: DTypeLike | None = None,
    format: str = "auto",
    overwrite: bool = False,
    hidden: str = "memory",
    hidden_dtype: DTypeLike | None = None,
    target_bits: float | Budget | None = None,
    resume: bool = False,
    restart: bool = False,
    mesh: Mesh | None = None,
    progress: Progress = True,
    **settings: object,
) -> Outcome:
    """Quantize a checkpoint without holding more than two of its blocks at a time.

    The tensors are those that ``awq_jax.load(src).quantize(...)`` and ``save(dst)`` would write, to the bit. A
    run that was killed continues when the same call is made again, and ends with the same bytes.

    Memory: the block at work and the one being read, the packed ones that are being written, the hidden
    states of the calibration set unless they are on disk, the statistics of one block, and what one group
    of weights needs while it is rounded. It does not depend on the number of blocks.

    Args:
      src: float checkpoint: a directory, ``.gguf`` file, hub id, or an open source.
      dst: directory to create. Until it is done the work is in a hidden directory beside it.
      calib, samples, seq_len, batch_size, seed, column, bos: see `awq_jax.serve.model.Model.quantize`.
      dtype: of float tensors and activations; see `awq_jax.load`.
      format: see `awq_jax.serve.model.Model.save`.
      overwrite: replace ``dst`` if it is a checkpoint.
      hidden: where hidden states are kept: ``"memory"``; or ``"disk"``, in the working directory, from where
        a run continues at once. From memory it sends the calibration set through the finished blocks again.
      hidden_dtype: to keep hidden states in: ``"float32"``, ``"bfloat16"`` or ``"float16"``. None takes the
        model's own, which changes nothing in the result.
      target_bits: see `awq_jax.serve.model.Model.quantize`.
      resume: it is an error if there is no unfinished run to continue.
      restart: discard an unfinished run.
      mesh: devices that share the work: batches of the calibration set, and columns of the weights. All of
        the mesh's, however it is arranged; None: one, or all where JAX runs in several processes. The bits do
        not depend on it, and a run may be continued with another. All processes make the same call, see
        ``src`` and ``dst`` on a file system that they share, and each writes some of the parts.
      progress: show a progress bar on stderr (of process 0); or call this function with what is done of how much
        (see `awq_jax.progress`).
      **settings: fields of `AwqConfig`; ``explicit_scale`` is False unless given.

    Raises:
      ConfigError: on a bad setting, or if ``src`` is quantized already.
      UnsupportedModelError: the architecture is not one of `awq_jax.models.supported`.
      ShapeError: listing the weights that the group size does not divide.
      FormatError: the format cannot hold what is asked for.
      WeightError: a tensor is missing, unexpected, or holds NaN or inf.
      CheckpointError: ``src`` is damaged, ``dst`` exists, the disk is full or too small, or an unfinished run
        had another source, other settings, other calibration data or another environment.
      CalibrationError: the calibration data are empty or do not fit the model.
      ProcessError: another process of this run has ended.
    """
    if resume and restart:
        raise ConfigError("resume continues an unfinished run and restart discards it: give one of them")
    names = name_of(dtype), name_of(hidden_dtype, "hidden_dtype")
    budget = None if target_bits is None else Budget.of(target_bits)
    given = samples, seq_len, batch_size, seed, column, bos, names[0], format, overwrite, hidden, names[1]
    options = Options(*given, budget)
    with team() as processes:
        job = prepare(src, dst, calib, options, settings, pool_of(mesh, processes))
        return run(job, resume=resume, restart=restart, progress=progress)


def run(job: Job, *, resume: bool = False, restart: bool = False, progress: Progress = True) -> Outcome:
    """Do, or continue, what `awq_jax.stream.job.prepare` has checked; see `quantize_checkpoint`."""
    pool = job.session.pool
    job.agree()
    if not pool.rank:
        if restart:
            _tidy(job)
        if not job.unfinished() and resume:
            given = Setting("resume", True)
            raise CheckpointError(f"there is no unfinished run of {job.path} to continue; leave {given} out", given)
        job.check_space()
    try:
        with parts.opened(job) as done:
            resumed = len(done.shards)
            shown_here = progress if not pool.rank else False
            if job.options.budget is not None:
                budgeted.settle(job, shown_here)
            with bar(shown_here, "quantize", "block", len(job.session.blocks)) as shown:
                _quantize(job, done, shown)
            start = time.perf_counter()
            ended = ("", "") if pool.rank else parts.finish(job, done)
            format, problem = json.loads(pool.meet(json.dumps(ended))[0])
            report = job.session.report(filter(None, done.notes), job.batches)
            report.calibration = job.description
            if not pool.rank:
                advice.warn(report)
            report.seconds["save"] = time.perf_counter() - start
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            told = f"cannot write {job.path}: {e}. Free some space and"
        else:
            told = f"{job.path} could not be finished: {e}. Repair what that names and"
        raise CheckpointError(f"{told} run the same command again: it continues after the last finished block") from e
    if not pool.rank:
        _tidy(job)
    if problem:
        raise FormatError(f"{problem}. Nothing is lost: the result is in {job.path}, in the format {format}")
    return Outcome(report, format, resumed)


def _quantize(job: Job, done: Manifest, shown: Bar) -> None:
    """Make the parts that are not there yet."""
    session, config = job.session, job.session.chain.config
    blocks = session.blocks
    finished = len(done.shards)
    for block, note in zip(blocks, done.notes, strict=False):
        session.restore(block, note)
    shown.update(min(finished, len(blocks)))
    if finished > len(blocks):
        return
    with parts.PartWriter(job, done) as writer:
        streams, reached = job.open_hidden(finished)
        with BlockReader(job, blocks[reached:]) as reader:
            packed = parts.read_back(job, done, reached)
            for block in blocks[reached:finished]:
                session.pass_on(block, reader(block), *streams, served=packed)
            number = finished
            for result in session.run(blocks[finished:], reader, *streams):
                writer.put(number, list(model_params.tensors(result.leaves, config)), session.note(result))
                for hidden in streams:
                    hidden.forget(len(done.shards))
                shown.update()
                number += 1  # `enumerate` would hold on to the block while the next is at work
                del result
                host_memory.trim()
        writer.put(len(blocks), naming.carried(job.source, config), {})


class BlockReader:
    """Reads a block's parameters, and the next block's tensors meanwhile.

    Args:
      job: whose weights.
      blocks: the order in which they will be asked for.
    """

    def __init__(self, job: Job, blocks: Sequence[DecoderBlock]) -> None:
        self._job, self._blocks = job, iter(blocks)
        self._pool = ThreadPoolExecutor(1, "read")
        self._coming: Future[dict[str, list[np.ndarray | QuantizedTensor]]] | None = None

    def __enter__(self) -> BlockReader:
        self._start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, block: DecoderBlock) -> Leaves:
        assert self._coming is not None
        tensors = self._coming.result()
        self._coming = None
        weights = self._job.weights
        leaves = {p: weights.leaf(block.prefix + p, tensors.pop(p)) for p in list(tensors)}
        self._start()
        return leaves

    def _start(self) -> None:
        block = next(self._blocks, None)
        if block is not None:
            wanted = self._job.session.read_by(block)
            self._coming = self._pool.submit(
                lambda: {p: list(self._job.weights.read(block.prefix + p)) for p in wanted}
            )


def _tidy(job: Job) -> None:
    shutil.rmtree(job.work, ignore_errors=True)
