"""Settings of the default run: most of its time is XLA compiling programs that are then run once.

They are in the environment before jax is imported, so that the workers and the commands which tests start have them
too: few optimizations, and a cache of compiled programs that all these processes share and that ends with the run.
With `pytest -m slow` everything is compiled as users do it, but the user's own cache is left alone.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
HELPERS = [ROOT / folder for folder in ("tests/helpers", "tests/convert/fuzz", "docs/_build")]


def pytest_configure(config: pytest.Config) -> None:
    gc.set_threshold(200_000, 50, 100)  # traces make millions of small objects, few of them garbage: 6 % of the time
    # Torch's threads would wait for one another on the cores that the other worker needs.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if config.getoption("markexpr") == "slow":
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
        return
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones do not know the first flag, and abort
        flags = os.environ.get("XLA_FLAGS", "").split()
        named = {flag.partition("=")[0] for flag in flags}
        quick = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
        os.environ["XLA_FLAGS"] = " ".join([*flags, *(q for q in quick if q.partition("=")[0] not in named)])
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the first process of the run: workers and commands inherit it
        directory = tempfile.mkdtemp(prefix="awq-jax-compiled-")
        config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": directory,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests share models and compiled programs, so each file goes to one worker, those of many tests first."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getvalue("dist") == "load" else None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without torch, the files that need none are still tested."""
    if importlib.util.find_spec("torch"):
        return None
    file = collection_path / "conftest.py" if collection_path.is_dir() else collection_path
    return True if file.suffix == ".py" and _needs_torch(file) else None


def _needs_torch(file: Path) -> bool:
    """Whether a file of the tests, or one that it imports, imports torch at its top."""
    if not file.is_file():
        return False
    names = re.findall(r"^(?:import|from) (\w+)", file.read_text(), re.MULTILINE)
    folders = (file.parent, *HELPERS)
    return "torch" in names or any(_needs_torch(d / f"{name}.py") for name in names for d in folders)
