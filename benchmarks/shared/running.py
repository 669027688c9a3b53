"""How a benchmark is run, what a process costs, and how a result is written."""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import ParamSpec, TypeVar
from unittest import mock

P = ParamSpec("P")
R = TypeVar("R")
Row = dict[str, object]


def run(
    main: Callable[[Sequence[str] | None], Row],
    smoke: Callable[[Path], Iterable[Sequence[str]]],
    arguments: Sequence[str] | None = None,
) -> list[Row]:
    """``main``; or, if the only argument is ``--smoke``, each command of ``smoke`` in a directory that goes away.

    Args:
      main: takes the command line, and returns what it has found.
      smoke: writes tiny inputs into a directory, and says with which arguments ``main`` covers its own code.
      arguments: None takes those of this process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given != ["--smoke"]:
        return [main(given)]
    with tempfile.TemporaryDirectory() as directory:
        # The processes of one benchmark compile the same programs.
        cache = {"JAX_COMPILATION_CACHE_DIR": directory, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        with mock.patch.dict(os.environ, cache):
            return [main(command) for command in smoke(Path(directory))]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the module's docstring as its help."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--smoke", action="store_true", help="given alone: run all of this on a tiny input, in seconds")
    return made


def finish(result: Row, out: Path | None) -> Row:
    """Print a result as JSON, and write it to ``out``."""
    text = json.dumps(result, indent=1)
    print(text, flush=True)
    if out is not None:
        out.write_text(text + "\n")
    return result


def machine() -> Row:
    """Where a result was made."""
    return {
        "machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "python": platform.python_version(), "jax": version("jax"), "numpy": version("numpy"),
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a process took: seconds, and its peak of resident memory in MiB."""

    wall: float
    user: float
    system: float
    peak_mb: int

    @property
    def cpu(self) -> float:
        """Of all threads, in user and system mode."""
        return self.user + self.system

    def row(self) -> Row:
        """Rounded, for a result."""
        return {
            "wall_seconds": round(self.wall, 2), "cpu_seconds": round(self.cpu, 2),
            "user_seconds": round(self.user, 2), "system_seconds": round(self.system, 2), "peak_rss_mb": self.peak_mb,
        }  # fmt: skip


def status_bytes(field: str, process: int | str = "self") -> int:
    """A number of ``/proc/<process>/status``: ``VmRSS``, resident now, or ``VmHWM``, the peak.

    `resource.getrusage` would give the peak of the process that started this one, kept across exec.

    Raises:
      OSError: the process has ended.
    """
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(f"process {process} has no {field}: it has ended")


def spent() -> Cost:
    """By this process since it began; its wall time is not known here."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Cost(0.0, used.ru_utime, used.ru_stime, status_bytes("VmHWM") >> 20)


def measured(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> tuple[R, Cost]:
    """What ``work`` returns, and what this process spent meanwhile; the peak is that since it began."""
    start, before = time.perf_counter(), spent()
    out = work(*args, **kwargs)
    wall, after = time.perf_counter() - start, spent()
    return out, Cost(wall, after.user - before.user, after.system - before.system, after.peak_mb)


def apart(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> tuple[R, Cost]:
    """``work`` in a fresh process, and all that the process took, the start of Python and imports included."""
    start = time.perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        out = pool.submit(work, *args, **kwargs).result()
        cost = pool.submit(spent).result()
        return out, dataclasses.replace(cost, wall=time.perf_counter() - start)


def json_of(command: Sequence[str]) -> dict[str, float | str]:
    """The last line that a command prints, which is a JSON object of numbers and words."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float | str] = json.loads(done.stdout.splitlines()[-1])
    return found


@dataclasses.dataclass(frozen=True)
class Watched:
    """A command that has ended.

    Attributes:
      code: its exit status, negative if a signal ended it.
      cost: by the kernel's accounting.
      samples: seconds since the start, bytes resident then.
    """

    code: int
    cost: Cost
    samples: list[tuple[float, int]]


def watched(command: Sequence[str], log: Path, limit: float = float("inf")) -> Watched:
    """Run a command with its output in ``log``, and look at its memory twenty times a second.

    It is killed after ``limit`` seconds. Compilations are not taken from JAX's cache on disk, which would hide what
    they cost. Torch's threads wait passively: spinning, two of them took 7 times the processor time of one on a busy
    machine.
    """
    print("+", " ".join(command), file=sys.stderr, flush=True)
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"OMP_WAIT_POLICY": "PASSIVE"}
    start, samples, peak = time.perf_counter(), [(0.0, 0)], 0
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            now = time.perf_counter() - start
            try:
                samples.append((now, status_bytes("VmRSS", process.pid)))
                peak = status_bytes("VmHWM", process.pid)
            except OSError:  # between its end and our asking
                continue
            if now > limit:
                process.kill()
            time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    used = ended[2]
    cost = Cost(time.perf_counter() - start, used.ru_utime, used.ru_stime, peak >> 20)
    return Watched(process.returncode, cost, samples)


def succeeded(command: Sequence[str], log: Path) -> Watched:
    """As `watched`, where anything but success ends this program with the end of the log."""
    done = watched(command, log)
    if done.code:
        raise SystemExit(f"exit status {done.code}: {' '.join(command)}\n{log.read_text()[-2000:]}")
    return done


def rounded(values: Mapping[str, float], digits: int = 1) -> Row:
    """The same numbers, shorter."""
    return {name: round(value, digits) for name, value in values.items()}
