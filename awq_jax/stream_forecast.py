"""What a streamed quantization will need, before it runs: blocks, memory, disk, and time from a trial."""

from __future__ import annotations

import dataclasses
import shutil
import time
from typing import Any

from awq_jax.blocks import Block
from awq_jax.hidden import InMemory
from awq_jax.stream import Reader
from awq_jax.stream_job import Job

TRIAL_BATCHES = 2
COPIES = 8  # of a group's weights in float32, at most, while it is rounded
SQUARES = 6  # matrices of the size of its Gram


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run will need.

    Attributes:
      blocks: of layers, and how many parameters the largest has.
      parameters: of the whole model.
      memory: what is in memory at the worst moment -> bytes; besides the program itself.
      disk: bytes that the run writes beside the target.
      disk_free: bytes free there.
      seconds: phase -> estimated seconds; ``"compile"`` as it was in the trial.
    """

    blocks: int
    largest: int
    parameters: int
    memory: dict[str, int]
    disk: int
    disk_free: int
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        totals = {"memory_total": sum(self.memory.values()), "seconds_total": sum(self.seconds.values())}
        return dataclasses.asdict(self) | totals


def forecast(job: Job) -> Forecast:
    """Estimate from shapes, and from a trial on the embedding and the first layer; writes nothing."""
    blocks = job.session.blocks
    sizes = [b.elements for b in blocks]
    parent = next(p for p in job.path.parents if p.exists())
    return Forecast(
        blocks=len(job.session.chain.config.layers),
        largest=max(sizes),
        parameters=sum(sizes),
        memory=memory(job),
        disk=job.disk(),
        disk_free=shutil.disk_usage(parent).free,
        seconds=_trial(job),
    )


def memory(job: Job) -> dict[str, int]:
    """Bytes in memory at the worst moment, by what they are for."""
    floats = [job.float_bytes(b) for b in job.session.blocks]
    packed = [job.packed_bytes(b) for b in job.session.blocks]
    grams, rounding = 0, 0
    for block in job.session.blocks:
        own = 0
        for group, targets in job.session.work(block):
            experts = 1
            for n in (*group.scan, *group.batch):
                experts *= n
            own += 4 * experts * group.channels**2
            weights = sum(_size(t.site.shape) for t in targets)
            rounding = max(rounding, 4 * (COPIES * weights + SQUARES * group.channels**2))
        grams = max(grams, own)
    return {
        "block": max(floats),
        "next block": max(floats[1:], default=0),
        "packed blocks": 2 * max(packed),
        "hidden states": job.hidden_bytes() if job.options.hidden == "memory" else 0,
        "statistics": grams,
        "rounding": rounding,
    }


def table(f: Forecast) -> str:
    """For a terminal."""
    lines = [
        f"{f.parameters / 1e9:.3g} billion parameters in {f.blocks} layers; "
        f"{f.largest / 1e6:.1f} million in the largest block",
        f"memory, besides the program: {_gib(sum(f.memory.values()))}",
        *(f"  {name}: {_gib(n)}" for name, n in f.memory.items()),
        f"disk: {_gib(f.disk)} while it runs ({_gib(f.disk_free)} free)",
        f"time: {_time(sum(f.seconds.values()))}, from a trial on the first block",
        *(f"  {name}: {_time(s)}" for name, s in f.seconds.items()),
    ]
    return "\n".join(lines)


def _trial(job: Job) -> dict[str, float]:
    """Seconds by phase: the first layer done twice, for what it takes once it is compiled."""
    session, clock = job.session, time.perf_counter
    first = session.blocks[:2]
    batches = job.batches[:TRIAL_BATCHES]
    start = clock()
    with Reader(job, first) as reader:
        hidden = InMemory(batches, job.options.hidden_dtype)
        session.calibrate(first[0], reader(first[0]), hidden, len(batches))
        leaves = reader(first[1])
    before = InMemory([hidden.get(i) for i in range(len(batches))], job.options.hidden_dtype)
    stats = session.calibrate(first[1], leaves, hidden, len(batches))
    session.quantize(first[1], leaves, stats)
    compiled = clock() - start
    start = clock()
    stats = session.calibrate(first[1], leaves, before, len(batches))
    calibrated = clock() - start
    done = session.quantize(first[1], leaves, stats)
    share = sum(b.elements for b in _with_weights(job)) / max(first[1].elements, 1)
    tokens = sum(b.size for b in job.batches) / sum(b.size for b in batches)
    return {
        "compile": max(0.0, compiled - calibrated - sum(done.seconds.values())),
        "calibrate": calibrated * tokens * share,
        "search": done.seconds["search"] * share,
        "round": done.seconds["round"] * share,
    }


def _with_weights(job: Job) -> list[Block]:
    return [b for b in job.session.blocks if job.session.work(b)]


def _size(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def _gib(n: float) -> str:
    return f"{n / 2**30:.2f} GiB"


def _time(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}"
