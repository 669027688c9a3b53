"""What a streamed quantization is to do, checked: everything that can be refused is refused before the work."""

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from awq_jax import data, models, pack
from awq_jax._version import __version__
from awq_jax.algorithm.methods import METHODS
from awq_jax.budget.allocate import alike, candidates
from awq_jax.config import SAMPLES, SEQ_LEN, AwqConfig, Budget
from awq_jax.convert import registry, writing
from awq_jax.convert.files import manifest
from awq_jax.convert.files.shards import refuse_existing
from awq_jax.convert.source import Source
from awq_jax.devices.pool import HERE, Pool
from awq_jax.dtypes import FLOATS, name_of
from awq_jax.errors import CheckpointError, ConfigError, FormatError, Setting
from awq_jax.models.weights.params import Weights
from awq_jax.qtensor import QuantizedTensor
from awq_jax.stream.decoder_blocks import HEAD, REST, DecoderBlock, shapes
from awq_jax.stream.hidden_states import Hidden, InMemory, OnDisk, holds
from awq_jax.stream.session import Session

log = logging.getLogger(__name__)

FLOAT_FORMATS = ("float", "gguf")
HIDDEN = "hidden"  # in the working directory: hidden states
QUANTIZED = "quantized"  # in there: those of the quantized model
ALLOCATION = "allocation.json"  # in there: the settings that were chosen for a budget
OUT = "out"  # the finished checkpoint, about to be renamed
FINISHED = "finished.json"
SPARE = 64 << 20  # bytes left free on the disk


@dataclasses.dataclass(frozen=True)
class Options:
    """Arguments of `awq_jax.quantize_checkpoint` that are not `AwqConfig`'s."""

    samples: int = SAMPLES
    seq_len: int = SEQ_LEN
    batch_size: int | None = None
    seed: int = 0
    column: str | None = None
    bos: str = "auto"
    dtype: str | None = None
    format: str = "auto"
    overwrite: bool = False
    hidden: str = "memory"
    hidden_dtype: str | None = None
    budget: Budget | None = None


@dataclasses.dataclass
class Job:
    """A quantization that `prepare` has checked, and its working directory.

    Attributes:
      source: the float checkpoint.
      path: where the result goes.
      work: the working directory.
      options: as given.
      settings: what to quantize to, as asked.
      session: blocks and plan. With a budget its settings become those chosen (see `awq_jax.stream.budgeted`).
      weights: the source's parameters.
      batches: calibration tokens, int32 ``[B, T]`` each.
      description: of the calibration data.
    """

    source: Source
    path: Path
    work: Path
    options: Options
    settings: AwqConfig
    session: Session
    weights: Weights
    batches: list[np.ndarray]
    description: str

    def digest(self) -> dict[str, str]:
        """What decides the result, digested; a run is continued only if none of it changed."""
        tokens = hashlib.sha256()
        for batch in self.batches:
            tokens.update(repr(batch.shape).encode() + np.ascontiguousarray(batch).tobytes())
        o = self.options
        chosen = self.settings.to_dict() | {"dtype": o.dtype, "hidden_dtype": o.hidden_dtype}
        if o.budget is not None:
            chosen |= dataclasses.asdict(o.budget)
        return {
            "source": manifest.fingerprint(self.source),
            "settings": json.dumps(chosen, sort_keys=True),
            "calibration data": tokens.hexdigest(),
            "environment": f"awq_jax {__version__}, jax {jax.__version__} on {jax.default_backend()}",
        }

    def fingerprint(self) -> str:
        """`digest` as one text, for the manifest."""
        return json.dumps(self.digest(), sort_keys=True)

    def agree(self) -> None:
        """See that all processes are to do the same.

        Raises:
          ConfigError: naming what differs.
          ProcessError: another process has ended.
        """
        mine = self.digest() | {"target": str(self.path), "options": repr(self.options)}
        first, *others = map(json.loads, self.session.pool.meet(json.dumps(mine)))
        for rank, other in enumerate(others, 1):
            if differs := [what for what in first if first[what] != other[what]]:
                raise ConfigError(
                    f"process {rank} has other {' and other '.join(differs)} than process 0; start all alike"
                )

    def unfinished(self) -> bool:
        """Whether an earlier run of this job left something.

        Raises:
          CheckpointError: it was another job's.
        """
        left = manifest.written_for(self.work)
        if left is None:
            return False
        before, now = _parsed(left), self.digest()
        changed = [what for what, value in now.items() if before.get(what) != value]
        if changed:
            which = _changed_settings(before.get("settings", ""), now["settings"])
            discard = Setting("restart", True)
            raise CheckpointError(
                f"an unfinished run in {self.work} had other {' and other '.join(changed)};{which} to continue it, "
                f"give what it was given; to discard it, pass {discard}",
                discard,
            )
        return True

    def installed(self) -> bool:
        """Whether an earlier run was killed after it had put the result in its place."""
        return (
            (self.work / FINISHED).is_file()
            and not (self.work / OUT).exists()
            and self.path.is_dir()
            and manifest.written_for(self.work) == self.fingerprint()
        )

    def open_hidden(self, finished: int) -> tuple[list[Hidden], int]:
        """Hidden states of this process's batches, and the number of blocks that they come out of.

        Those of the float model; then, if the session is sequential, those of the quantized one.

        Args:
          finished: blocks that are done, which the session has been told of (`Session.restore`).
        """
        session, pool, o = self.session, self.session.pool, self.options
        names = ("", QUANTIZED) if session.sequential else ("",)
        if not self.batches or all(b.kind in (HEAD, REST) and not session.work(b) for b in session.blocks[finished:]):
            return [InMemory(self.batches) for _ in names], finished  # nothing is left to calibrate: nobody looks
        if o.hidden == "memory":
            return [InMemory(self.batches, o.hidden_dtype) for _ in names], 0
        own = [i for i in range(len(self.batches)) if pool.mine(i)]
        dtype, size = o.hidden_dtype or session.activations, session.chain.config.hidden_size
        directory = self.work / HIDDEN
        if pool.team is not None:  # named after the batches: another number of processes keeps others
            directory /= hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]
        tokens = [self.batches[i] for i in own]
        kept = names if own else ()
        there = dtype is not None and all(holds(directory / n, finished, tokens, dtype, size) for n in kept)
        if not all(pool.meet("there" if there else "")):
            finished, dtype = 0, o.hidden_dtype
        return [OnDisk(directory / n, self.batches, own, dtype, size, finished) for n in names], finished

    def disk(self) -> int:
        """Bytes that the run will need on the disk, roughly (from above), with what it has written by now.

        The packed blocks, and three boundaries of hidden states while there are any; or the result made of those
        blocks, and what its next file is made of.
        """
        names = self.session.chain.config.names
        packed = sum(map(self.packed_bytes, self.session.blocks))
        packed += sum(self.source.info(n).nbytes for n in self.source.names() if names.carries(n))
        boundary = self.hidden_bytes() if self.options.hidden == "disk" else 0
        return packed + max(packed + min(packed, writing.SHARD) + boundary, 3 * boundary)

    def packed_bytes(self, block: DecoderBlock) -> int:
        """Bytes that a block will take, roughly (from above)."""
        total = 0.0
        for path in block.owned:
            n = math.prod(block.leaves[path])
            target = self.session.targets.get(block.prefix + path)
            if target is None:
                total += n * self._itemsize(block.prefix + path)
            else:
                rows = target.rows / target.k
                total += n * rows * (target.leaf.bits / 8 + 5 / target.leaf.group_size)
        return math.ceil(total)

    def float_bytes(self, block: DecoderBlock) -> int:
        """Bytes of a block's own parameters as they are read."""
        return sum(math.prod(block.leaves[p]) * self._itemsize(block.prefix + p) for p in block.owned)

    def hidden_bytes(self) -> int:
        """Bytes of the hidden states of all calibration tokens, in both streams if there are two."""
        itemsize = FLOATS[self.options.hidden_dtype or self.weights.base()].itemsize
        one = sum(b.size for b in self.batches) * self.session.chain.config.hidden_size * itemsize
        return one * (1 + self.session.sequential)

    def _itemsize(self, path: str) -> int:
        """Bytes of a number of a parameter that stays float."""
        return FLOATS[self.weights.dtype_of(path)].itemsize

    def check_space(self) -> None:
        """Refuse a disk that is too small.

        Raises:
          CheckpointError: with both numbers.
        """
        there = sum(f.stat().st_size for f in self.work.rglob("*") if f.is_file()) if self.work.is_dir() else 0
        parent = next(p for p in self.path.parents if p.exists())
        free, needed = shutil.disk_usage(parent).free, self.disk() - there + SPARE
        if free < needed:
            raise CheckpointError(
                f"{parent} has {free / 2**30:.2f} GiB free, and the run needs at least {needed / 2**30:.2f} GiB "
                "(packed blocks, the checkpoint made of them"
                + (", hidden states" if self.options.hidden == "disk" else "")
                + "); free some space or choose another disk"
            )


def prepare(
    src: str | Path | Source,
    dst: str | Path,
    calib: data.CalibrationSource | None,
    options: Options,
    settings: Mapping[str, object],
    pool: Pool = HERE,
) -> Job:
    """Open the checkpoint and check all that can be checked; reads the calibration data, but no weight.

    ``pool``: devices that will share the work.

    Raises: see `awq_jax.stream.run.quantize_checkpoint`.
    """
    o = options
    config = AwqConfig.from_dict({"explicit_scale": False} | dict(settings))
    config = config if o.budget is None else o.budget.base(config)
    if o.batch_size is not None and o.batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, or None; got {o.batch_size}")
    for name, value in (("dtype", o.dtype), ("hidden_dtype", o.hidden_dtype)):
        name_of(value, name)
    if o.hidden not in ("memory", "disk"):
        raise ConfigError(f'hidden must be "memory" or "disk"; got {o.hidden!r}')
    if o.format != "auto" and registry.get(o.format).sink is not None:
        raise FormatError(f"{o.format} is not written block by block; write awq-jax and convert it (awq-jax convert)")
    calib = data.default(METHODS[config.method].needs_statistics) if calib is None else calib
    path = Path(os.path.abspath(Path(dst).expanduser()))
    source = registry.open_source(src) if isinstance(src, str | Path) else src
    writing.refuse_source(path, source)
    work = path.parent / f".{path.name}.quantizing"
    if not work.exists():
        refuse_existing(path, o.overwrite)
    if isinstance(calib, str):
        data.check_source(calib)
    architecture = models.config_of(source)
    check_float(source)
    session = Session(architecture, config, pool)
    if o.format != "auto":
        _check_format(session, o.format, o.budget)
    dtype = o.dtype or ("float32" if source.format == "gguf" else None)
    weights = Weights(source, architecture, shapes(session.blocks), dtype)
    text = data.load(
        calib,
        source.tokenizer() if _needs_tokenizer(calib) else None,
        samples=o.samples,
        seq_len=min(o.seq_len, architecture.max_length),
        vocab_size=architecture.vocab_size,
        seed=o.seed,
        column=o.column,
        bos=o.bos,
    )
    say_if_cut(architecture, o.seq_len)
    batches = session.arranged(text.batches(o.batch_size))
    job = Job(source, path, work, o, config, session, weights, batches, text.description)
    if not job.installed():
        refuse_existing(path, o.overwrite)
    return job


def check_float(source: Source) -> None:
    """Refuse a source of packed weights.

    Raises:
      ConfigError: naming its format.
    """
    if source.format not in FLOAT_FORMATS:
        where = writing.path_of(source) or "the source"
        raise ConfigError(f"{where} is quantized already ({source.format}); give the float checkpoint")


def _changed_settings(before: str, now: str) -> str:
    """Which of the settings differ, both given as JSON: ``" bits=3 then and bits=4 now;"``."""
    old, new = _parsed(before), _parsed(now)
    return "".join(f" {k}={old[k]} then and {k}={v} now;" for k, v in new.items() if k in old and old[k] != v)


def _parsed(fingerprint: str) -> dict[str, str]:
    try:
        found = json.loads(fingerprint)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def say_if_cut(architecture: models.ModelConfig, seq_len: int) -> None:
    """Warn if calibration sequences are not of ``seq_len`` tokens, as the model's context holds fewer."""
    if seq_len > (most := architecture.max_length):
        log.warning("calibrating on sequences of %d tokens, not %d: that is the model's context", most, seq_len)


def _needs_tokenizer(calib: data.CalibrationSource) -> bool:
    """Whether the calibration data are text, or may be."""
    if isinstance(calib, data.CalibrationSet) or (hasattr(calib, "ndim") and calib.ndim == 2):
        return False
    return not (isinstance(calib, str | Path) and Path(calib).suffix == ".npy")


def _check_format(session: Session, format: str, budget: Budget | None) -> None:
    """Refuse a format that cannot hold weights of these sizes and settings: asked with empty weights.

    With a budget these have all the settings that may be chosen, in turn.
    """
    names = session.chain.config.names
    dummies: dict[tuple[int, ...], tuple[str, QuantizedTensor]] = {}
    leaves = {path: target.leaf for path, target in session.targets.items()}
    if budget is not None:
        tried = candidates(session.targets.values(), session.settings, budget)
        every = {name: list(own.values()) for name, own in tried.items()}
        for number, unit in enumerate(alike(session.plan, session.targets, session.settings)):
            leaves |= {t.site.name: every[t.site.name][number % len(every[t.site.name])] for t in unit}
    for path, target in session.targets.items():
        leaf, n = leaves[path], math.prod(target.site.shape) // target.k
        if target.group.batch or "{e}" in names.of(path):
            n //= math.prod(target.site.shape[:-2])
        k = target.k if target.k <= leaf.group_size else leaf.group_size + target.k % leaf.group_size
        groups = -(-k // leaf.group_size)
        dummies[k, n, leaf.bits, leaf.group_size, leaf.symmetric] = (
            path,
            QuantizedTensor(
                qweight=np.zeros((pack.words(groups * leaf.group_size, leaf.bits), n), np.uint32),
                scales=np.ones((groups, n), np.float16),
                zeros=None if leaf.symmetric else np.zeros((groups, n), np.uint8),
                inv_scale=None,
                bits=leaf.bits,
                group_size=leaf.group_size,
                axes="nk",
                k_dims=(k,),
                n_dims=(n,),
                dtype="float32",
            ),
        )
    problem = writing.unfit(format, ((f"{path}.weight", q) for path, q in dummies.values()))
    if problem is not None:
        raise FormatError(f"format {format} cannot hold this: {problem}")
