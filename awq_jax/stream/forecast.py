"""What a streamed quantization will need, before it runs: blocks, memory, disk, and time from a trial."""

import contextlib
import dataclasses
import math
import resource
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np

from awq_jax.algorithm.methods import METHODS
from awq_jax.calibration import expert_grams
from awq_jax.quantizer.column_pieces import ALIGNED, PIECE, PIECE_ELSEWHERE
from awq_jax.stream import folds
from awq_jax.stream.decoder_blocks import Leaves
from awq_jax.stream.hidden_states import InMemory
from awq_jax.stream.job import Job
from awq_jax.stream.run import BlockReader

TRIAL_BATCHES = 2
COPIES = 12  # float32 copies of a piece of a group's weights, at most, while it is rounded (as XLA counts them)
SQUARES = 4  # matrices of the size of its Gram: the scaled one, its factor, and what makes them


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run will need.

    Attributes:
      blocks: how many layers: blocks without embedding and head.
      largest: parameters of the largest block.
      parameters: of the whole model.
      memory: what is in the host's memory at the worst moment -> bytes. ``"program"`` is what the trial was seen
        to take beyond what its shapes explain: Python, JAX, compiled code, activations of a batch.
      device_memory: the same of an accelerator's; empty where the host computes.
      disk: bytes that the run writes beside the target.
      disk_free: bytes free there.
      seconds: phase -> estimated seconds; ``"compile"`` as it was in the trial.
    """

    blocks: int
    largest: int
    parameters: int
    memory: dict[str, int]
    device_memory: dict[str, int]
    disk: int
    disk_free: int
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON data."""
        totals = {"memory_total": sum(self.memory.values()), "seconds_total": sum(self.seconds.values())}
        return dataclasses.asdict(self) | totals


def forecast(job: Job) -> Forecast:
    """Estimate from shapes, and from a trial on the embedding and the first layer; writes nothing."""
    blocks = job.session.blocks
    sizes = [b.count_elements() for b in blocks]
    parent = next(p for p in job.path.parents if p.exists())
    _forget_peak()
    seconds = _trial(job)
    host, device = memory(job, _peak(), _device_peak())
    return Forecast(
        blocks=len(job.session.chain.config.layers),
        largest=max(sizes),
        parameters=sum(sizes),
        memory=host,
        device_memory=device,
        disk=job.disk(),
        disk_free=shutil.disk_usage(parent).free,
        seconds=seconds,
    )


def memory(job: Job, peak: int, device_peak: int | None = None) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes at the worst moment, by what they are for: in the host's memory, and in an accelerator's.

    Args:
      peak: resident bytes of this process, at most, while the trial ran.
      device_peak: bytes in use on the accelerator, at most; None if the host computes.
    """
    blocks = job.session.blocks
    tokens = sum(b.size for b in job.batches)
    seen = sum(b.size for b in _tried(job))
    hidden = job.hidden_bytes() if job.options.hidden == "memory" else 0
    moments = [_moment(job, i, hidden) for i in range(len(blocks))]
    # The trial held the embedding, then the first layer and its hidden states before and after.
    tried = [_moment(job, i, 2 * job.hidden_bytes() * seen // max(tokens, 1)) for i in range(2)]
    tried[1]["next block"] = 0
    if device_peak is None:
        return _worst(moments, tried, peak), {}
    there = ("block", "statistics", "rounding")

    def split(parts: list[dict[str, int]], device: bool) -> list[dict[str, int]]:
        return [{k: n for k, n in m.items() if (k in there) == device} for m in parts]

    host = _worst(split(moments, False), split(tried, False), peak)
    return host, _worst(split(moments, True), split(tried, True), device_peak)


def _moment(job: Job, number: int, hidden: int) -> dict[str, int]:
    """What is in memory while a block is rounded (or carried through)."""
    blocks = job.session.blocks
    block = blocks[number]
    grams, rounding, pairs, left, alive = 0, 0, 0, 0, 0
    judged = METHODS[job.settings.method].needs_statistics and not job.session.sequential
    tokens = sum(b.size for b in job.batches)
    limit = PIECE.get(jax.default_backend(), PIECE_ELSEWHERE)
    for group, targets in job.session.work(block):
        instances = math.prod((*group.scan, *group.batch))
        weights = sum(math.prod(t.site.shape) for t in targets) // instances
        piece = min(weights, max(limit, ALIGNED * group.channels))
        some = expert_grams.at_a_time(group)
        grams += 4 * (instances if some is None else some + 1) * group.channels**2  # and that of the layer
        if judged and not group.batch:
            grams += 4 * instances * group.channels**2  # of the sequences kept out
        if job.session.sequential and instances == 1:
            # Of tokens tried, of others, of those kept out, of all fitted: Gram, drift, and as much of the stream.
            pairs = max(pairs, 4 * 3 * (folds.TRIED + 3) * group.channels**2)
        if job.session.sequential:
            here = 4 * tokens * (group.channels + 2 * job.session.chain.config.hidden_size)
            left, alive = left + here, max(alive, here)
        at_once = min(job.session.pool.at_once, -(-weights // piece))
        rounding = max(rounding, 4 * (COPIES * at_once * piece + SQUARES * group.channels**2))
    return {
        "block": job.float_bytes(block),
        "next block": job.float_bytes(blocks[number + 1]) if number + 1 < len(blocks) else 0,
        "packed blocks": sum(job.packed_bytes(b) for b in blocks[max(0, number - 1) : number + 1]),
        "hidden states": hidden + left + alive,  # at all groups in the float stream, at one in the other
        "statistics": grams + pairs,
        "rounding": rounding,
    }


def _worst(moments: list[dict[str, int]], tried: list[dict[str, int]], peak: int) -> dict[str, int]:
    """The moment that takes most, and what the trial took beyond its own."""
    known = max(sum(m.values()) for m in tried)
    worst = max(moments, key=lambda m: sum(m.values()))
    return worst | {"program": max(0, peak - known)}


def table(f: Forecast) -> str:
    """For a terminal."""
    lines = [
        f"{f.parameters / 1e9:.3g} billion parameters in {f.blocks} layers; "
        f"{f.largest / 1e6:.1f} million in the largest block",
        *_lines("memory", f.memory),
        *(_lines("memory of the device", f.device_memory) if f.device_memory else ()),
        f"disk: {_gib(f.disk)} while it runs ({_gib(f.disk_free)} free)",
        f"time: {_time(sum(f.seconds.values()))}, from a trial on the first block",
        *(f"  {name}: {_time(s)}" for name, s in f.seconds.items()),
    ]
    return "\n".join(lines)


def _lines(what: str, parts: dict[str, int]) -> list[str]:
    return [f"{what}: {_gib(sum(parts.values()))}", *(f"  {name}: {_gib(n)}" for name, n in parts.items())]


def _tried(job: Job) -> list[np.ndarray]:
    """The batches of the trial: with two streams as many as make all folds."""
    return job.batches[: folds.FOLDS + 1 if job.session.sequential else TRIAL_BATCHES]


def _trial(job: Job) -> dict[str, float]:
    """Seconds by phase: the first layer done twice, for what it takes once it is compiled."""
    session, clock = job.session, time.perf_counter
    first = session.blocks[:2]
    batches = _tried(job)
    start = clock()
    with BlockReader(job, first) as reader:
        hidden = InMemory(batches, job.options.hidden_dtype)
        session.calibrate(first[0], reader(first[0]), hidden)
        leaves = reader(first[1])
    before = InMemory([hidden.get(i) for i in range(len(batches))], job.options.hidden_dtype)
    if session.sequential:
        return _sequential_trial(job, leaves, [hidden.get(i) for i in range(len(batches))])
    stats = session.calibrate(first[1], leaves, hidden)
    session.quantize(first[1], leaves, stats)
    compiled = clock() - start
    start = clock()
    stats = session.calibrate(first[1], leaves, before)
    calibrated, again = clock() - start, session.collecting
    done = session.quantize(first[1], leaves, stats)
    again = session.collecting - again  # grows with the tokens, as calibration does; the rest does not
    rest = 1 - again / max(done.seconds["search"] + done.seconds["round"], again, 1e-9)
    share = sum(b.count_elements() for b in session.blocks if session.work(b)) / max(first[1].count_elements(), 1)
    tokens = sum(b.size for b in job.batches) / max(sum(b.size for b in batches), 1)
    return {
        "compile": max(0.0, compiled - calibrated - sum(done.seconds.values())),
        "calibrate": (calibrated + again) * tokens * share,
        "search": done.seconds["search"] * rest * share,
        "round": done.seconds["round"] * rest * share,
    }


def _sequential_trial(job: Job, leaves: Leaves, inputs: list[np.ndarray]) -> dict[str, float]:
    """`_trial` in two streams, both of them with ``inputs``."""
    session, clock = job.session, time.perf_counter
    block = session.blocks[1]
    start = clock()
    for _ in range(2):  # the first time, programs are compiled
        streams = [InMemory(inputs), InMemory(inputs)]
        (done,) = session.run([block], lambda _: leaves, *streams)
    whole, once = clock() - start, sum(done.seconds.values())
    share = sum(b.count_elements() for b in session.blocks if session.work(b)) / max(block.count_elements(), 1)
    tokens = sum(b.size for b in job.batches) / max(sum(x.shape[0] * x.shape[1] for x in inputs), 1)
    grows = ("calibrate", "follow")
    found = {n: s * share * (tokens if n in grows else 1) for n, s in done.seconds.items() if n != "load"}
    return {"compile": max(0.0, whole - 2 * once), **found}


def _forget_peak() -> None:
    """Count the peak of this process's memory from now on, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Resident bytes of this process, at most."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _device_peak() -> int | None:
    """Bytes in use on the accelerator, at most; None if the host computes."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return None if stats is None else int(stats["peak_bytes_in_use"])


def _gib(n: float) -> str:
    return f"{n / 2**30:.2f} GiB"


def _time(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}"
