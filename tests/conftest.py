"""Settings of the default run: most of its time is XLA compiling programs that are then run once.

They are in the environment before jax is imported, so that the commands which tests start have them too. With
`pytest -m slow` everything is compiled as users do it.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Torch's threads would wait for one another on the cores that the other worker needs.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if config.getoption("markexpr") == "slow":
        return
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones do not know the flag, and abort
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_cpu_use_fusion_emitters" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests share models and compiled programs, so each file goes to one worker, those of many tests first."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getvalue("dist") == "load" else None
