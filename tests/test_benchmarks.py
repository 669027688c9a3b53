"""Each benchmark's own small input goes through all of its code, and leaves the results that are kept alone."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

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


# The last one needs Keras.
LONG = ("cpu_rows", "few_tokens", "lora", "mixed", "quality", "serve", "speed", "stream", "vs_keras")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in NAMES])
def test_smoke(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark, before = importlib.import_module(name), state(BENCHMARKS / "results")
    results = benchmark.main(["--smoke"])
    assert all(results)
    assert all(map(math.isfinite, numbers(results)))
    assert not any(result.get("failures") for result in results)
    assert state(BENCHMARKS / "results") == before


def test_a_process_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What smokes do in this process is done, and accounted, in one of its own."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    running = importlib.import_module("shared.running")
    process, cost = running.apart(os.getpid)
    assert process != os.getpid()
    assert min(cost.wall, cost.cpu, cost.peak_mb) > 0
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "never")
    assert "JAX_COMPILATION_CACHE_DIR" not in running.environment()


def test_options_are_parameters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    running = importlib.import_module("shared.running")

    def one(
        model: str, *, text: Path, sizes: tuple[int, ...] = (1, 2), layers: int | None = None, fast: bool = False,
        where: Literal["memory", "disk"] = "memory",
    ) -> dict[str, object]:  # fmt: skip
        return {"model": model, "text": str(text), "sizes": list(sizes), "layers": layers, "fast": fast, "where": where}

    def two(*, out: Path) -> dict[str, object]:
        return {"out": out}

    main = functools.partial(running.run, (one, two), lambda directory: ())
    given = {"model": "m", "text": "t", "sizes": [1, 2], "layers": None, "fast": False, "where": "memory"}
    assert main(["one", "m", "--text", "t", "--out", str(tmp_path / "r.json")]) == [given]
    assert json.loads((tmp_path / "r.json").read_text()) == given
    [found] = main(["one", "m", "--text", "t", "--sizes", "3", "--layers", "4", "--fast", "--where", "disk"])
    assert found == given | {"sizes": [3], "layers": 4, "fast": True, "where": "disk"}
    assert main(["two", "--out", "d"]) == [{"out": Path("d")}]
    for wrong in (["one", "m"], ["one", "m", "--text", "t", "--where", "tape"], ["two"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert running.settings(["bits=3", "clip=False", "method=awq+gptq"]) == {
        "bits": 3, "clip": False, "method": "awq+gptq",
    }  # fmt: skip


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


def test_entry_points() -> None:
    assert {"convert", "gpu", "quality", "serve", "speed", "vs_peers"} <= set(NAMES)
