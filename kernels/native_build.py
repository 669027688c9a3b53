"""Compiles `kernels/native/`, the packed matmul for CPUs, once for each user, with the system's C++ compiler.

Libraries that do the same, considered first (November 2026): ggml (in wheels of llama.cpp's bindings) multiplies by
blocks of its own, of 32 weights each with its scale; oneDNN (a wheel of Intel's) puts weights into an order of its own;
FBGEMM's wheel needs PyTorch; KleidiAI is sources, for Arm. None reads our words as they lie, so each would hold every
weight a second time, and none may be called from an XLA program without compiled code of ours.

The library is kept in ``$XDG_CACHE_HOME/awq_jax/native`` (``~/.cache``), a folder that only its owner may enter, under
a name made of the sources, XLA's header, the compiler and the instructions that it uses. It is put there in one step,
so processes may compile at once, and is loaded only if its bytes are those that were compiled.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from awq_jax.devices.compile_cache import default_directory

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
FLAGS = (
    *("-O2", "-ftree-vectorize", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden"),
    *("-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-trapping-math"),
)
SYMBOL = "awq_packed_matmul"


class Level(NamedTuple):
    """A set of instructions.

    Attributes:
      name: as `awq_jax.kernels.explain` calls it.
      machines: what `platform.machine` may say.
      needs: names in ``/proc/cpuinfo``.
      flags: for the compiler.
    """

    name: str
    machines: tuple[str, ...]
    needs: frozenset[str]
    flags: tuple[str, ...]


X86, ARM = ("x86_64", "AMD64"), ("aarch64", "arm64")
AVX2 = frozenset(("avx2", "fma", "f16c"))
AVX512 = frozenset(("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"))
WIDE = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512")
BASE = ("-mavx2", "-mfma", "-mf16c")
AMX = frozenset(("amx_tile", "amx_int8"))
LEVELS = (  # the best first
    Level("amx-int8", X86, AVX2 | AVX512 | AMX, (*BASE, *WIDE, "-mamx-tile", "-mamx-int8")),
    Level("avx512-vnni", X86, AVX2 | AVX512, (*BASE, *WIDE)),
    Level("avx-vnni", X86, AVX2 | {"avx_vnni"}, (*BASE, "-mavxvnni")),
    Level("avx2", X86, AVX2, BASE),
    Level("neon-dotprod", ARM, frozenset(("asimddp",)), ("-march=armv8.2-a+dotprod",)),
    Level("portable", (*X86, *ARM), frozenset(), ()),
)


class CannotBuild(Exception):
    """Why there is no library."""


@functools.cache
def features() -> frozenset[str]:
    """Of this machine's processors, by their names in ``/proc/cpuinfo``; empty where nothing says."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return frozenset(("asimddp",))
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = [line.partition(":") for line in text.splitlines()]
    found = [frozenset(rest.split()) for name, _, rest in lines if name.strip() in ("flags", "Features")]
    return frozenset.intersection(*found) if found else frozenset()


def levels() -> Iterator[Level]:
    """Those that this machine has, the best first."""
    for level in LEVELS:
        if platform.machine() in level.machines and level.needs <= features():
            yield level


@functools.cache
def target(symbol: str, name: str = "") -> tuple[str, str] | str:
    """The level that is used (of that name, or the best) for a function, and its name in XLA; or why there is none."""
    reason = "no instructions that it knows"
    for level in levels():
        if name not in ("", level.name):
            continue
        try:
            code = library(level)
            if not code.awq_allowed():
                raise CannotBuild(f"the system does not let this process use {level.name}")
            handler = getattr(code, symbol)
        except CannotBuild as e:
            reason = str(e)
            continue
        own = f"{symbol}_{level.name.replace('-', '_')}"
        jax.ffi.register_ffi_target(own, jax.ffi.pycapsule(handler), platform="cpu")
        return level.name, own
    return f"its code cannot be compiled here: {reason}"


def library(level: Level) -> ctypes.CDLL:
    """The library for one level, compiled if it was not.

    Raises:
      CannotBuild: there is no compiler, it fails, or there is no safe place for what it makes.
    """
    compiler = _compiler()
    flags = [*FLAGS, *level.flags, "-I", jax.ffi.include_dir()]
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    key = hashlib.sha256()
    about = os.stat(compiler)
    key.update(repr((compiler, about.st_size, about.st_mtime_ns, FLAGS, level.flags)).encode())
    for file in (*_sources(), header):
        key.update(file.read_bytes())
    place = _folder() / f"{level.name}-{key.hexdigest()[:32]}"
    if not place.is_dir():
        _compile(compiler, flags, place)
    code, digest = place / "kernel.so", place / "sha256"
    try:
        if digest.read_text() != hashlib.sha256(code.read_bytes()).hexdigest():
            raise CannotBuild(f"{code} is not what was compiled; delete {place}")
        return ctypes.CDLL(str(code))
    except OSError as e:
        raise CannotBuild(f"{code} cannot be loaded ({e}); delete {place}") from e


def _sources() -> list[Path]:
    return sorted(p for p in SOURCES.iterdir() if p.suffix in (".cc", ".h"))


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return os.path.realpath(found)
    raise CannotBuild("there is no C++ compiler (c++, g++ or clang++ on PATH, or $CXX)")


def _folder() -> Path:
    """Where libraries are kept: the user's own, and closed to others."""
    try:
        folder = default_directory().with_name("native")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = os.lstat(folder)
    except (OSError, RuntimeError) as e:
        raise CannotBuild(f"there is no folder for compiled code ({e}); set XDG_CACHE_HOME") from e
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077:
        raise CannotBuild(f"{folder} is open to others: make it yours alone (chmod 700), or set XDG_CACHE_HOME")
    return folder


def _compile(compiler: str, flags: list[str], place: Path) -> None:
    log.info("compiling the packed matmul for this processor, once: %s", place)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".building-") as building:
        made = Path(building) / "done"
        made.mkdir(mode=0o700)
        code = made / "kernel.so"
        sources = [str(p) for p in _sources() if p.suffix == ".cc"]
        command = [compiler, *flags, *sources, "-o", str(code), "-lpthread"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=600)
        except (OSError, subprocess.SubprocessError) as e:
            raise CannotBuild(f"the C++ compiler {compiler} does not run ({e})") from e
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
            raise CannotBuild(f"the C++ compiler {compiler} fails: {said.strip()}")
        (made / "sha256").write_text(hashlib.sha256(code.read_bytes()).hexdigest())
        try:
            os.rename(made, place)
        except OSError as e:  # another process was first
            if not place.is_dir():
                raise CannotBuild(f"{place} cannot be made ({e})") from e
