"""Each benchmark's own small input goes through all of its code, and leaves the results that are kept alone."""

from __future__ import annotations

import ast
import importlib
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = sorted(p.stem for p in BENCHMARKS.glob("*.py"))


def numbers(value: object) -> Iterator[float]:
    """All of them in a result."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, float):
        yield value


def state(directory: Path) -> dict[str, int]:
    """When each file was written."""
    return {p.name: p.stat().st_mtime_ns for p in directory.iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from shared import running

    benchmark, before = importlib.import_module(name), state(BENCHMARKS / "results")
    results = running.run(benchmark.main, benchmark.smoke, ["--smoke"])
    assert all(results)
    assert all(map(math.isfinite, numbers(results)))
    assert not any(result.get("failures") for result in results)
    assert state(BENCHMARKS / "results") == before


def test_no_private_name_of_the_library() -> None:
    for path in BENCHMARKS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "super()"):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom):
                names = [name.name for name in node.names]
            private = [name for name in names if name.startswith("_") and not name.startswith("__")]
            assert not private, f"{path.name}: {ast.unparse(node)}"


def test_seven_entry_points() -> None:
    assert NAMES == ["convert", "gpu", "quality", "scale", "speed", "stream", "vs_peers"]
