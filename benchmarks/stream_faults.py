"""What interrupts a streamed quantization: kills at random moments, and files as a power cut may leave them."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FINISHING = 0.3  # share of the kills that wait until the last block is done


def kills(args: argparse.Namespace, command: Callable[..., list[str]]) -> dict[str, Any]:
    """Kill and continue until it is done, and compare with an uninterrupted run.

    Each run keeps hidden states in memory or on the disk, in turn, continuing what the other one left.
    """
    whole, broken = args.out / "whole", args.out / "broken"
    start = time.perf_counter()
    subprocess.run(command(whole, "memory"), check=True, stdout=subprocess.DEVNULL)
    length = time.perf_counter() - start
    random.seed(args.seed)
    sent: list[dict[str, Any]] = []
    done = 0
    while len(sent) < args.kills:
        hidden = ("memory", "disk")[len(sent) % 2]
        before = _finished(broken)
        process = subprocess.Popen(command(broken, hidden), stdout=subprocess.DEVNULL)
        began = time.perf_counter()
        if random.random() < FINISHING:
            _wait_until_assembled(process, broken)
            time.sleep(random.uniform(0, 0.1))
        else:
            _wait(process, random.uniform(0.1, 1) * length)
        if process.poll() is None:
            process.kill()
            process.wait()
            sent.append({"hidden": hidden, "after_seconds": time.perf_counter() - began, "blocks_before": before}
                        | {"blocks": _finished(broken), "stage": _stage(broken)})  # fmt: skip
            print(sent[-1], flush=True)
        elif process.returncode:
            raise SystemExit(f"a run failed after {len(sent)} kills")
        if broken.exists() and not _work(broken).exists():  # it got through: compare, and begin anew
            _compare(whole, broken)
            shutil.rmtree(broken)
            done += 1
    subprocess.run(command(broken, "memory"), check=True, stdout=subprocess.DEVNULL)
    _compare(whole, broken)
    return {
        "kills": len(sent),
        "identical": True,
        "results_compared": done + 1,
        "seconds_uninterrupted": length,
        "at": sent,
        "power_cuts": [_power_cut(args, command, whole, name, damage) for name, damage in DAMAGE.items()],
    }


def _cut_part(work: Path) -> None:
    last = sorted(work.glob("part-*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])


def _lose_part(work: Path) -> None:
    sorted(work.glob("part-*.safetensors"))[0].unlink()


def _half_line(work: Path) -> None:
    lines = (work / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (work / "manifest.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])


def _zeros_at_the_end(work: Path) -> None:
    with (work / "manifest.jsonl").open("ab") as f:
        f.write(bytes(512))


def _no_line(work: Path) -> None:
    (work / "manifest.jsonl").write_bytes(b"")


def _stale(work: Path) -> None:
    (work / "part-00099.safetensors").write_bytes(b"from another run")
    (work / "something.tmp").write_bytes(b"half")
    (work / "out").mkdir(exist_ok=True)
    (work / "out" / "stray.safetensors").write_bytes(b"half")


def _cut_hidden(work: Path) -> None:
    for path in (work / "hidden").glob("*.bin"):
        path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "the last part cut in half": _cut_part,
    "the first part lost": _lose_part,
    "half a manifest line": _half_line,
    "zeros at the end of the manifest": _zeros_at_the_end,
    "an empty manifest": _no_line,
    "stray files": _stale,
    "hidden states cut short": _cut_hidden,
}


def _power_cut(
    args: argparse.Namespace, command: Callable[..., list[str]], whole: Path, name: str, damage: Callable[[Path], None]
) -> dict[str, Any]:
    """Stop a run in the middle, do the damage, and continue."""
    broken = args.out / "cut"
    shutil.rmtree(broken, ignore_errors=True)
    process = subprocess.Popen(command(broken, "disk"), stdout=subprocess.DEVNULL)
    while process.poll() is None and _finished(broken) < 4:
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = _finished(broken)
    damage(_work(broken))
    text = subprocess.run(command(broken, "disk"), check=True, capture_output=True, text=True).stdout
    _compare(whole, broken)
    return {"damage": name, "blocks_before": before, "blocks_kept": json.loads(text)["resumed"], "identical": True}


def _work(target: Path) -> Path:
    return target.parent / f".{target.name}.quantizing"


def _finished(target: Path) -> int:
    """Blocks in the manifest."""
    try:
        return max(0, (_work(target) / "manifest.jsonl").read_bytes().count(b"\n") - 1)
    except OSError:
        return 0


def _stage(target: Path) -> str:
    work = _work(target)
    if not work.exists():
        return "before the work" if not target.exists() else "after the end"
    if target.exists():
        return "in place"
    return "assembling" if (work / "out").exists() else "blocks"


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _wait_until_assembled(process: subprocess.Popen[bytes], target: Path) -> None:
    """Until the result is being put together."""
    while process.poll() is None and not (_work(target) / "out").exists():
        time.sleep(0.002)


def _compare(a: Path, b: Path) -> None:
    digests = [{f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in d.iterdir()} for d in (a, b)]
    if digests[0] != digests[1]:
        raise SystemExit(f"{a} and {b} differ")
