"""What interrupts a streamed quantization: kills at random moments, and files as a power cut may leave them."""

import contextlib
import dataclasses
import hashlib
import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.running import Row

FINISHING = 0.3  # share of the kills that wait until the last block is done


@dataclasses.dataclass
class Job:
    """A quantization to be interrupted.

    Attributes:
      out: directory of the results.
      command: what quantizes into a directory, with hidden states in ``"memory"`` or on ``"disk"``.
    """

    out: Path
    command: Callable[[Path, str], list[str]]

    @property
    def whole(self) -> Path:
        """The result of a run that nothing interrupts."""
        return self.out / "whole"

    def run(self, target: Path, hidden: str) -> str:
        """To the end; what it prints."""
        return subprocess.run(self.command(target, hidden), check=True, stdout=subprocess.PIPE, text=True).stdout

    def interrupt(self, target: Path, hidden: str, wait: Callable[[subprocess.Popen[bytes]], None]) -> Row | None:
        """Start, ``wait``, and kill; how far it got, or None if it had reached the end."""
        before, began = finished(target), time.perf_counter()
        process = subprocess.Popen(self.command(target, hidden), stdout=subprocess.DEVNULL)
        wait(process)
        if process.poll() is None:
            process.kill()
            process.wait()
            return {"hidden": hidden, "after_seconds": time.perf_counter() - began, "blocks_before": before,
                    "blocks": finished(target), "stage": stage(target)}  # fmt: skip
        if process.returncode:
            raise SystemExit(f"a run failed: {process.args!r}")
        return None

    def compare(self, target: Path) -> None:
        """Every file, byte for byte, with the uninterrupted run's."""
        a, b = ({f.name: hashlib.sha256(f.read_bytes()).digest() for f in d.iterdir()} for d in (self.whole, target))
        if a != b:
            raise SystemExit(f"{self.whole} and {target} differ")


def kills(job: Job, count: int, seed: int) -> Row:
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


def cut_part(work: Path) -> None:
    last = sorted(work.glob("part-*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])


def lose_part(work: Path) -> None:
    min(work.glob("part-*.safetensors")).unlink()


def half_line(work: Path) -> None:
    lines = (work / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (work / "manifest.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])


def zeros_at_the_end(work: Path) -> None:
    with (work / "manifest.jsonl").open("ab") as f:
        f.write(bytes(512))


def no_line(work: Path) -> None:
    (work / "manifest.jsonl").write_bytes(b"")


def stray_files(work: Path) -> None:
    (work / "part-00099.safetensors").write_bytes(b"from another run")
    (work / "something.tmp").write_bytes(b"half")
    (work / "out").mkdir(exist_ok=True)
    (work / "out" / "stray.safetensors").write_bytes(b"half")


def cut_hidden(work: Path) -> None:
    for path in (work / "hidden").glob("*.bin"):
        path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "the last part cut in half": cut_part,
    "the first part lost": lose_part,
    "half a manifest line": half_line,
    "zeros at the end of the manifest": zeros_at_the_end,
    "an empty manifest": no_line,
    "stray files": stray_files,
    "hidden states cut short": cut_hidden,
}


def power_cuts(job: Job, damages: Sequence[str], blocks: int = 3) -> list[Row]:
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
        return max(0, (work_of(target) / "manifest.jsonl").read_bytes().count(b"\n") - 1)
    except OSError:
        return 0


def stage(target: Path) -> str:
    """How far a run has got."""
    if not work_of(target).exists():
        return "after the end" if target.exists() else "before the work"
    if target.exists():
        return "in place"
    return "assembling" if (work_of(target) / "out").exists() else "blocks"
