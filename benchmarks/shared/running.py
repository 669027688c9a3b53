"""How a benchmark is run, what a process costs, and how a result is written."""

import argparse
import ast
import dataclasses
import inspect
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from unittest import mock

P = ParamSpec("P")
R = TypeVar("R")
Row = dict[str, object]


def run(
    commands: Sequence[Callable[..., Row]],
    smoke: Callable[[Path], Iterable[Sequence[str]]],
    arguments: Sequence[str] | None = None,
) -> list[Row]:
    """One of ``commands``; or, if ``--smoke`` is all that is given, each line of ``smoke``.

    Args:
      commands: functions whose parameters are their command line (see `add_options`), chosen by name if there are
        several. What one returns is printed as JSON, and written to ``--out``; one that has such an option of its
        own does that itself.
      smoke: writes tiny inputs into a directory, which goes away afterwards, and says with which arguments
        ``commands`` cover their own code. What is measured `apart` otherwise runs in this process then.
      arguments: None takes those of this process.
    """
    form = argparse.RawDescriptionHelpFormatter
    doc, several = sys.modules[smoke.__module__].__doc__, len(commands) > 1
    doc = doc if several else f"{doc}\n{inspect.getdoc(commands[0])}"
    parser = argparse.ArgumentParser(description=doc, formatter_class=form)
    parser.add_argument("--smoke", action="store_true", help="given alone: run all of this on a tiny input, in seconds")
    sub = parser.add_subparsers(required=True) if several else None
    for work in commands:
        own = inspect.getdoc(work)
        add_options(sub.add_parser(work.__name__, description=own, formatter_class=form) if sub else parser, work)

    def once(line: Sequence[str]) -> Row:
        options = vars(parser.parse_args(line))
        del options["smoke"]
        work = options.pop("work")
        if "out" in inspect.signature(work).parameters:
            return work(**options)
        out = options.pop("out")
        result: Row = work(**options)
        text = json.dumps(result, indent=1)
        print(text, flush=True)
        if out is not None:
            out.write_text(text + "\n")
        return result

    given = sys.argv[1:] if arguments is None else list(arguments)
    if given != ["--smoke"]:
        return [once(given)]
    with tempfile.TemporaryDirectory() as directory:
        # The processes of one benchmark compile the same programs.
        cache = {"JAX_COMPILATION_CACHE_DIR": directory, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        with (
            mock.patch.dict(os.environ, cache | dict(os.environ)),
            mock.patch.object(sys.modules[__name__], "apart", measured),
        ):
            return [once(line) for line in smoke(Path(directory))]


def add_options(parser: argparse.ArgumentParser, work: Callable[..., Row]) -> None:
    """An argument for each parameter of ``work``, an option for one that is keyword-only; ``--out`` in any case.

    A `bool` is a switch, a tuple takes several values, a `Literal` is a choice; an option without a default has to be
    given.
    """
    parser.set_defaults(work=work)
    parameters = inspect.signature(work, eval_str=True).parameters
    for name, each in parameters.items():
        inside = typing.get_args(each.annotation)  # of ``tuple[int, ...]``, ``int | None``, ``Literal["a", "b"]``
        kind = inside[0] if inside else each.annotation
        how: dict[str, Any] = {"choices": inside} if isinstance(kind, str) else {"type": kind}
        if kind is bool:
            how = {"action": "store_true"}
        if typing.get_origin(each.annotation) is tuple:
            how["nargs"] = "+"
        if each.kind is each.KEYWORD_ONLY:
            name = f"--{name.replace('_', '-')}"
            how |= {"required": True} if each.default is each.empty else {"default": each.default}
        parser.add_argument(name, **how, help="" if each.default is each.empty else "default: %(default)s")
    if "out" not in parameters:
        parser.add_argument("--out", type=Path, help="JSON file to write")


def settings(pairs: Iterable[str]) -> dict[str, Any]:
    """``("bits=3", "clip=False", "method=rtn")`` as keyword arguments."""
    found: dict[str, Any] = {}
    for key, value in (pair.split("=", 1) for pair in pairs):
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a word
            found[key] = value
    return found


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


def environment(programs: Path | None = None) -> dict[str, str]:
    """For a process that is measured.

    Compilations are not taken from a cache on disk, which would hide what they cost, unless it is given:
    ``programs``. Torch's threads wait passively: spinning, two of them took 7 times the processor time of one on a busy
    machine.
    """
    others = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"OMP_WAIT_POLICY": "PASSIVE"}
    if programs is None:
        return others | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    kept = {"JAX_COMPILATION_CACHE_DIR": str(programs), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return others | kept | {"JAX_ENABLE_COMPILATION_CACHE": "true"}


def apart(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> tuple[R, Cost]:
    """``work`` in a fresh process, and all that the process took, the start of Python and imports included."""
    start = time.perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        out = pool.submit(work, *args, **kwargs).result()
        cost = pool.submit(spent).result()
        return out, dataclasses.replace(cost, wall=time.perf_counter() - start)


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

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.cost.peak_mb << 20


def watched(
    command: Sequence[str], log: Path, limit: float = float("inf"), variables: Mapping[str, str] | None = None
) -> Watched:
    """Run a command with its output in ``log``, and look at its memory twenty times a second.

    It is killed after ``limit`` seconds. ``variables``: its environment, if it is another than `environment`.
    """
    print("+", " ".join(command), file=sys.stderr, flush=True)
    start, samples, peak = time.perf_counter(), [(0.0, 0)], 0
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=environment() if variables is None else variables, stdout=out, stderr=subprocess.STDOUT
        )
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


def succeeded(command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None) -> Watched:
    """As `watched`, where anything but success ends this program with the end of the log."""
    done = watched(command, log, variables=variables)
    if done.code:
        raise SystemExit(f"exit status {done.code}: {' '.join(command)}\n{log.read_text()[-2000:]}")
    return done


def rounded(values: Mapping[str, float], digits: int = 1) -> Row:
    """The same numbers, shorter."""
    return {name: round(value, digits) for name, value in values.items()}
