"""Checkpoints that several tests start from, each made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peers
import pytest
from sources import ASYMMETRIC, Source

import awq_jax


@pytest.fixture(scope="session")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Float checkpoints, by the names of `peers.float_checkpoint`."""
    root = tmp_path_factory.mktemp("floats")
    return functools.cache(lambda name: peers.float_checkpoint(root / name, name))


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory, floats: Callable[[str], Path]) -> Callable[[Source, str], Path]:
    """Quantized checkpoints in awq_jax's own format."""
    root = tmp_path_factory.mktemp("sources")

    @functools.cache
    def make(source: Source, name: str) -> Path:
        bits, group, symmetric = source
        model = awq_jax.load(floats(name))
        calib = np.stack([peers.prompt(start, 64) for start in range(0, 320, 20)]).astype(np.int32)
        method = "awq+gptq" if source == ASYMMETRIC else "rtn"
        model.quantize(calib, bits=bits, group_size=group, symmetric=symmetric, method=method, progress=False)
        target = root / f"w{bits}-g{group}-{symmetric}-{name}"
        model.save(target, format="awq-jax")
        return target

    return make
