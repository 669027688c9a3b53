"""The house from its source: imports go down from room to room, and modules form no circle.

A room is a folder of the package, or a file at its root. Imports inside functions count as well, so that none hides a
climb or a circle; those under ``TYPE_CHECKING`` count too.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"awq_jax": ROOT / "awq_jax", "awq_jax.kernels": ROOT / "kernels", "awq_jax.convert": ROOT / "convert"}

# Lowest first. What stands in one line may import what stands above it, and its own room.
ROOMS = (
    "errors dtypes _version config pack placement qtensor paths report progress",  # types that everything shares
    "devices",
    "kernels",
    "convert",
    "algorithm",
    "trace",
    "plan",
    "nnx linen keras",
    "models",
    "calibration",
    "quantizer",
    "budget",
    "data",
    "stream",
    "adapters",
    "serve",
    "evaluate trainable lora",
    "bench lm_eval server vllm",
    "cli __main__",
)
RANK = {room: i for i, room in enumerate(" ".join(ROOMS).split())}


class Import(NamedTuple):
    """One module importing another, and where it says so."""

    importer: str
    imported: str
    where: str


def modules() -> dict[str, Path]:
    """Every module of the package by its installed name."""
    found = {}
    for package, folder in SOURCES.items():
        for file in folder.rglob("*.py"):
            name = ".".join([package, *file.relative_to(folder).with_suffix("").parts])
            found[name.removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imports(name: str, source: str, known: Iterable[str]) -> Iterator[Import]:
    """What a module imports of the package, anywhere in its source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} has a relative import"
            whole = [f"{node.module}.{a.name}" for a in node.names]
            targets = [w if w in known else str(node.module) for w in whole]
        else:
            continue
        yield from (Import(name, t, f"{name}:{node.lineno}") for t in targets if t.split(".")[0] == "awq_jax")


def room(module: str) -> str:
    """``awq_jax.plan.fold`` -> ``plan``."""
    return module.split(".")[1]


def complaint(i: Import) -> str:
    """Why an import is out of order, "" if it is not."""
    if i.importer == "awq_jax":  # the public face reaches everything, lazily
        return ""
    if i.imported == "awq_jax":
        return f"{i.where} imports the package's face; import the module that has the name"
    if RANK[room(i.imported)] > RANK[room(i.importer)]:
        return f"{i.where} imports {i.imported}, and {room(i.imported)} is above {room(i.importer)}"
    return ""


def circles(all_imports: Iterable[Import]) -> list[str]:
    """Each circle of modules, with the import that closes it."""
    graph: dict[str, list[Import]] = {}
    for i in all_imports:
        if i.imported != i.importer and i.importer != "awq_jax":
            graph.setdefault(i.importer, []).append(i)
    done: set[str] = set()
    found: list[str] = []

    def visit(module: str, path: list[str]) -> None:
        for i in graph.get(module, []):
            if i.imported in path:
                found.append(f"{i.where} closes {' -> '.join([*path[path.index(i.imported) :], i.imported])}")
            elif i.imported not in done:
                visit(i.imported, [*path, i.imported])
        done.add(module)

    for module in graph:
        if module not in done:
            visit(module, [module])
    return found


ALL = [i for name, file in MODULES.items() for i in imports(name, file.read_text(), MODULES)]


def test_every_room_has_a_rank() -> None:
    assert {room(m) for m in MODULES if m != "awq_jax"} == set(RANK)


def test_imports_go_down() -> None:
    assert [c for i in ALL if (c := complaint(i))] == []


def test_modules_form_no_circle() -> None:
    assert circles(ALL) == []


def test_the_root_holds_public_modules_and_shared_types_only() -> None:
    assert len(list(SOURCES["awq_jax"].glob("*.py"))) <= 17


@pytest.mark.parametrize(("folder", "most"), [("awq_jax", 400), ("kernels", 400), ("convert", 400), ("tests", 600)])
def test_files_are_of_one_idea(folder: str, most: int) -> None:
    lines = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in (ROOT / folder).rglob("*.py")}
    assert {f: n for f, n in lines.items() if n > most} == {}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("from awq_jax.cli import common", "awq_jax.plan.fold:1 imports awq_jax.cli.common, and cli is above plan"),
        ("def f():\n    import awq_jax.serve.dot", "awq_jax.plan.fold:2 imports awq_jax.serve.dot"),
        ("from awq_jax import quantize", "the package's face"),
    ],
)
def test_a_climb_is_named(source: str, says: str) -> None:
    (bad,) = [c for i in imports("awq_jax.plan.fold", source, MODULES) if (c := complaint(i))]
    assert says in bad


def test_a_circle_is_named() -> None:
    chain = [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]
    (found,) = circles(Import(f"awq_jax.{x}", f"awq_jax.{y}", f"awq_jax.{x}:1") for x, y in chain)
    assert found == "awq_jax.c:1 closes awq_jax.a -> awq_jax.b -> awq_jax.c -> awq_jax.a"


def test_no_test_imports_a_test() -> None:
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    assert [
        f.name for f in tests if re.search(r"^\s*(import|from) (test_|tests\b|conftest)", f.read_text(), re.MULTILINE)
    ] == []
