"""What interrupts a streamed quantization: kills at random moments, and files as a power cut may leave them."""

import contextlib
import dataclasses
import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shared import running
from shared.running import Row

from awq_jax import cli
from awq_jax.convert.files.manifest import NAME as MANIFEST

FINISHING = 0.3  # share of the kills that wait until the last block is done


@dataclasses.dataclass
class Interrupted:
    """A quantization to be interrupted.

    Attributes:
      out: directory of the results.
      command: arguments of ``awq-jax`` that quantize into a directory, with hidden states in ``"memory"`` or on
        ``"disk"``.
    """

    out: Path
    command: Callable[[Path, str], list[str]]

    @property
    def whole(self) -> Path:
        """The result of a run that nothing interrupts."""
        return self.out / "whole"

    def run(self, target: Path, hidden: str) -> str:
        """To the end; what it prints."""
        said, _ = running.apart(printed, self.command(target, hidden))
        return said

    def interrupt(self, target: Path, hidden: str, wait: Callable[[subprocess.Popen[bytes]], None]) -> Row | None:
        """Start, ``wait``, and kill; how far it got, or None if it had reached the end."""
        before, began = finished(target), time.perf_counter()
        command = [sys.executable, "-m", "awq_jax", *self.command(target, hidden)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait(process)
        if process.poll() is None:
            process.kill()
            process.wait()
            return {"hidden": hidden, "after_seconds": time.perf_counter() - began, "blocks_before": before,
                    "blocks": finished(target), "stage": stage(target)}  # fmt: skip
        if process.returncode:
            raise SystemExit(f"a run failed: {command}")
        return None

    def compare(self, target: Path) -> None:
        """Every file, byte for byte, with the uninterrupted run's."""
        a, b = ({f.name: hashlib.sha256(f.read_bytes()).digest() for f in d.iterdir()} for d in (self.whole, target))
        if a != b:
            raise SystemExit(f"{self.whole} and {target} differ")


def printed(command: Sequence[str]) -> str:
    """What ``awq-jax quantize`` prints, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        if cli.main([*command]):
            raise SystemExit(f"a run failed: {command}")
    return said.getvalue()


def kill(job: Interrupted, count: int, seed: int) -> Row:
    """Kill and continue until it is done, and compare with an uninterrupted run.

    Each run keeps hidden states in memory or on the disk, in turn, continuing what the other one left.
    """
    broken = job.out / "broken"
    start = time.perf_counter()
    job.run(job.whole, "memory")
    length = time.perf_counter() - start
    random.seed(seed)
    sent: list[Row] = []
    done = 0

    def at_random(process: subprocess.Popen[bytes]) -> None:
        if random.random() < FINISHING:
            while process.poll() is None and not (work_of(broken) / "out").exists():  # until it is put together
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.1))
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(random.uniform(0.1, 1) * length)

    while len(sent) < count:
        if killed := job.interrupt(broken, ("memory", "disk")[len(sent) % 2], at_random):
            sent.append(killed)
            print(killed, flush=True)
        if broken.exists() and not work_of(broken).exists():  # it got through: compare, and begin anew
            job.compare(broken)
            shutil.rmtree(broken)
            done += 1
    if count:
        job.run(broken, "memory")
        job.compare(broken)
        done += 1
    return {
        "kills": len(sent),
        "identical": True,
        "results_compared": done,
        "seconds_uninterrupted": length,
        "at": sent,
    }


def edit(change: Callable[[bytes], bytes], pattern: str, which: slice = slice(None)) -> Callable[[Path], None]:
    """Damage that changes the content of some of the files that match."""

    def damage(work: Path) -> None:
        for path in sorted(work.glob(pattern))[which]:
            path.write_bytes(change(path.read_bytes()))

    return damage


def stray_files(work: Path) -> None:
    (work / "out").mkdir(exist_ok=True)
    for name in ("part-00099.safetensors", "something.tmp", "out/stray.safetensors"):
        (work / name).write_bytes(b"from another run")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "the last part cut in half": edit(lambda b: b[: len(b) // 2], "part-*.safetensors", slice(-1, None)),
    "the first part lost": lambda work: min(work.glob("part-*.safetensors")).unlink(),
    "half a manifest line": edit(lambda b: b[: (b.rindex(b"\n", 0, -1) + len(b)) // 2], MANIFEST),
    "zeros at the end of the manifest": edit(lambda b: b + bytes(512), MANIFEST),
    "an empty manifest": edit(lambda b: b"", MANIFEST),
    "stray files": stray_files,
    "hidden states cut short": edit(lambda b: b[:-100], "hidden/*.bin"),
}


def power_cuts(job: Interrupted, damages: Sequence[str], blocks: int = 3) -> list[Row]:
    """Stop a run after some blocks, do the damage, and continue; for each of some of `DAMAGE`."""
    broken = job.out / "cut"
    rows: list[Row] = []

    def in_the_middle(process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None and finished(broken) < blocks:
            time.sleep(0.02)

    for name in damages:
        shutil.rmtree(broken, ignore_errors=True)
        job.interrupt(broken, "disk", in_the_middle)
        before = finished(broken)
        DAMAGE[name](work_of(broken))
        kept = json.loads(job.run(broken, "disk"))["resumed"]
        job.compare(broken)
        rows.append({"damage": name, "blocks_before": before, "blocks_kept": kept, "identical": True})
    return rows


def work_of(target: Path) -> Path:
    """The working directory of an unfinished run."""
    return target.parent / f".{target.name}.quantizing"


def finished(target: Path) -> int:
    """Blocks in the manifest."""
    try:
        return max(0, (work_of(target) / MANIFEST).read_bytes().count(b"\n") - 1)
    except OSError:
        return 0


def stage(target: Path) -> str:
    """How far a run has got."""
    if not work_of(target).exists():
        return "after the end" if target.exists() else "before the work"
    if target.exists():
        return "in place"
    return "assembling" if (work_of(target) / "out").exists() else "blocks"
