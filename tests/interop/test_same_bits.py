"""Where a program has code that packs but none that computes on a CPU, its packed bits are ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import peers
import pytest
from safetensors.numpy import load_file
from sources import ASYMMETRIC, SYMMETRIC, Source

from awq_jax import convert

pytestmark = pytest.mark.slow

DRIVERS = Path(__file__).parents[2] / "benchmarks" / "peers"


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint."""
    return {name: array for file in directory.glob("*.safetensors") for name, array in load_file(file).items()}


@pytest.mark.parametrize(
    ("to", "source", "theirs", "parts"),
    [
        ("gemm", ASYMMETRIC, "gemm", {"qweight": "qweight", "qzeros": "qzeros", "scales": "scales"}),
        ("gemv", ASYMMETRIC, "gemv", {"qweight": "qweight", "qzeros": "qzeros", "scales": "scales"}),
        ("gemv", (4, 128, False), "gemv", {"qweight": "qweight", "qzeros": "qzeros", "scales": "scales"}),
        ("gemv_fast", ASYMMETRIC, "gemv_fast", {"qweight": "qweight", "qzeros": "qzeros", "scales": "scales"}),
        ("llm-awq", ASYMMETRIC, "gemv_fast", {"qweight": "qweight", "scaled_zeros": "qzeros", "scales": "scales"}),
        ("marlin", (4, 128, True), "marlin", {"qweight": "qweight", "scales": "scales"}),
        ("marlin", SYMMETRIC, "marlin", {"qweight": "qweight", "scales": "scales"}),
    ],
    ids=lambda value: str(value) if isinstance(value, str | tuple) else "",
)
def test_autoawq_packs_the_same_words(
    to: str,
    source: Source,
    theirs: str,
    parts: dict[str, str],
    sources: Callable[[Source, str], Path],
    tmp_path: Path,
) -> None:
    """AutoAWQ reads our GEMM checkpoint and packs it anew: bit for bit what we write in that layout."""
    peers.environment("autoawq")
    convert.checkpoint(sources(source, "llama"), tmp_path / "gemm", to="gemm")
    convert.checkpoint(tmp_path / "gemm", tmp_path / "ours", to=to, allow_lossy=True)
    peers.drive("autoawq", "repack_autoawq.py", tmp_path / "gemm", tmp_path / "theirs.safetensors", theirs)
    mine, made = tensors(tmp_path / "ours"), load_file(tmp_path / "theirs.safetensors")
    modules = sorted(name.removesuffix(".qweight") for name in made if name.endswith(".qweight"))
    assert len(modules) == 14
    for module in modules:
        for part, counterpart in parts.items():
            a, b = mine[f"{module}.{part}"], made[f"{module}.{counterpart}"]
            assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{module}.{part}"
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), err_msg=f"{module}.{part}")


@pytest.mark.parametrize("source", [ASYMMETRIC, (4, 128, False)], ids=str)
def test_compressed_tensors_converts_alike(
    source: Source, sources: Callable[[Source, str], Path], tmp_path: Path
) -> None:
    """compressed-tensors' own converter of AutoAWQ checkpoints writes the tensors that ours does."""
    peers.environment("compressed")
    convert.checkpoint(sources(source, "llama"), tmp_path / "gemm", to="gemm")
    convert.checkpoint(tmp_path / "gemm", tmp_path / "ours", to="compressed-tensors")
    peers.drive("compressed", DRIVERS / "compressed_tensors_convert.py", tmp_path / "gemm", tmp_path / "theirs")
    mine, made = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert mine.keys() == made.keys()
    for name, b in made.items():
        a = mine[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), err_msg=name)
