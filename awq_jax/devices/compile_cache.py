"""Compiled programs kept on disk from one process to the next, in JAX's own persistent compilation cache.

JAX keys an entry by the program, the versions of jaxlib and of the platform, and compiler options. XLA:CPU's machine
code also depends on the instructions that the processor has; a program compiled for others is loaded with no more than
a line on stderr, and may end in SIGILL. So each kind of processor, and each release of jax and jaxlib, has a directory
of its own. Within it JAX locks a file while it reads, writes and evicts.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import platform
import re
import shutil
import stat
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from awq_jax.errors import ConfigError

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 30
_ENTRY, _USED, _LOCK = "-cache", "-atime", ".lockfile"  # JAX's files: a program, when it was last used
_PLACE = re.compile(r"jax-[\w.+]+-jaxlib-[\w.+]+-[0-9a-f]{12}")
_FAILED = re.compile(r"Error (reading|writing) persistent compilation cache entry")


def default_directory() -> Path:
    """``awq_jax/programs`` in the user's directory of caches, ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "awq_jax" / "programs"


def cache_programs(directory: str | Path | None = None, max_bytes: int = MAX_BYTES) -> Path | None:
    """Keep compiled programs on disk, where later processes find them instead of compiling again.

    The command line does so by itself; a script calls this once, before JAX compiles anything. Results are the same to
    the bit: it is the same machine code. What is read is run, so only a directory that nobody else may write is used.

    Args:
      directory: where; None for `default_directory`. Each release of jax and jaxlib and each kind of processor has a
        folder of its own in it.
      max_bytes: of all programs; those unused for longest go first.

    Returns:
      The folder in use; None where JAX's settings (``JAX_COMPILATION_CACHE_DIR``, ``JAX_ENABLE_COMPILATION_CACHE``) say
      something already, which is left as it is, or where the directory cannot be used: then a line is logged, and
      programs are compiled as without it.

    Raises:
      ConfigError: ``max_bytes`` is not positive.
    """
    if max_bytes < 1:
        raise ConfigError(f"max_bytes must be positive; got {max_bytes}")
    try:
        base = Path(directory).expanduser().absolute() if directory is not None else default_directory()
        place = base / _key()
        if (decided := _decided()) is not None:
            return place if decided == str(place) else None
        if importlib.util.find_spec("filelock") is None:
            raise OSError("the package filelock is not installed")
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (base, place):
            _refuse_shared(folder)
        _repair(place)
        _bound_others(place, max_bytes // 2)
    except (OSError, RuntimeError) as e:  # RuntimeError: there is no home directory
        log.info("compiled programs are not kept: %s", e)
        return None
    _set(
        jax_compilation_cache_dir=str(place),
        jax_compilation_cache_max_size=max_bytes - max_bytes // 2,
        jax_persistent_cache_min_compile_time_secs=0.0,
        jax_persistent_cache_min_entry_size_bytes=-1,
        jax_persistent_cache_enable_xla_caches="none",  # XLA's own have no bound
    )
    return place


def disable() -> None:
    """Neither read nor keep compiled programs, whatever the environment says."""
    _set(jax_enable_compilation_cache=False)


@contextlib.contextmanager
def failures_in_one_line(place: Path | None) -> Iterator[None]:
    """Meanwhile programs that cannot be read or kept are compiled without JAX's warning for each; then ``place`` is
    emptied, since JAX replaces no entry, however damaged."""
    failed: list[str] = []
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, *rest: object, **named: object) -> None:
            if _FAILED.match(str(message)):
                failed.append(str(message).partition("': ")[2])
            else:
                others(message, *rest, **named)  # type: ignore[arg-type]

        warnings.showwarning = show
        yield
    if failed and place is not None:
        log.info("compiled programs in %s could not be used (%s); it is emptied", place, failed[0])
        with contextlib.suppress(OSError):
            _empty(place)


def _decided() -> str | None:
    """The directory that JAX's settings name; "" if they refuse any, None if they say nothing."""
    if (jax := sys.modules.get("jax")) is not None:
        return (jax.config.jax_compilation_cache_dir or None) if jax.config.jax_enable_compilation_cache else ""
    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in ("0", "false", "no", "off", "n", "f"):
        return ""
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or None


def _set(**settings: str | float) -> None:
    """JAX's settings, of this process and of those that it starts."""
    for name, value in settings.items():
        if (jax := sys.modules.get("jax")) is not None:
            jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def _key() -> str:
    """The folder for this processor and these releases."""
    processor = hashlib.sha256("\n".join(_processor()).encode()).hexdigest()[:12]
    return f"jax-{version('jax')}-jaxlib-{version('jaxlib')}-{processor}"


def _processor() -> list[str]:
    """What the system says of the first processor that does not change from one boot to the next."""
    known = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        named = ("flags", "features", "model", "vendor", "cpu", "isa")  # of x86, Arm, POWER, RISC-V
        known += [line for line in first.splitlines() if line.lower().startswith(named) and "MHz" not in line]
    return known


def _refuse_shared(folder: Path) -> None:
    """Refuse a folder that another user may write: what is in it is run.

    Raises:
      PermissionError: naming it; or this user may not write in it.
    """
    about = folder.stat()
    if not hasattr(os, "geteuid"):  # Windows
        return
    if about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"other users may write in {folder}: chmod go-w it, or remove it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write in {folder}")


def _repair(place: Path) -> None:
    """Remove what a process that was killed left half written: JAX would read it, and evict nothing any more."""
    import filelock

    try:
        with filelock.FileLock(place / _LOCK, timeout=1):
            names = {f.name for f in place.iterdir()}
            for here, other in ((_ENTRY, _USED), (_USED, _ENTRY)):
                for name in names:
                    if name.endswith(here) and name.removesuffix(here) + other not in names:
                        (place / name).unlink(missing_ok=True)
    except filelock.Timeout:  # another process is at it
        return


def _bound_others(place: Path, most: int) -> None:
    """Remove folders of other releases and processors, those unused for longest, until ``most`` bytes are left."""
    others = [d for d in place.parent.iterdir() if d != place and _PLACE.fullmatch(d.name) and not d.is_symlink()]
    found = []
    for other in others:
        with contextlib.suppress(OSError):  # it is being removed
            files = [f.stat() for f in other.iterdir()]
            found.append((max((f.st_mtime for f in files), default=0.0), sum(f.st_size for f in files), other))
    total = sum(size for _, size, _ in found)
    for _, size, other in sorted(found):
        if total <= most:
            return
        shutil.rmtree(other, ignore_errors=True)
        total -= size


def _empty(place: Path) -> None:
    import filelock

    with contextlib.suppress(filelock.Timeout), filelock.FileLock(place / _LOCK, timeout=1):
        for file in place.iterdir():
            if file.name.endswith((_ENTRY, _USED)):
                file.unlink(missing_ok=True)
