"""Every public name is in the reference of the site, and what the pages call a file is one."""

import importlib
import re
from pathlib import Path

import pytest

import awq_jax

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (ROOT / "docs").rglob("*.md"))
REFERENCE = {p.stem: p.read_text() for p in PAGES if p.parent.name == "reference"}
SHOWN = set(re.findall(r"^::: (\S+)", "\n".join(REFERENCE.values()), re.M))
MEMBERS = {m for names in re.findall(r"members: \[(.*?)\]", "\n".join(REFERENCE.values())) for m in names.split(", ")}


@pytest.mark.parametrize("name", awq_jax.__all__)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    assert f"awq_jax.{name}" in SHOWN or f"awq_jax.{name}" in {s.rpartition(".")[0] for s in SHOWN}


@pytest.mark.parametrize("module", ["convert", "kernels", "models"])
def test_every_public_name_of_a_package_is_in_the_reference(module: str) -> None:
    names = set(importlib.import_module(f"awq_jax.{module}").__all__)
    assert {n for n in names if n not in MEMBERS and f"awq_jax.{module}.{n}" not in SHOWN} == set()


def places(page: Path) -> list[str]:
    """What a page names as a file of the repository: ``kernels/xla.py``, but not ``NAME.py``."""
    names = re.findall(
        r"`((?:awq_jax|kernels|convert|tests|examples|benchmarks|docs)/[\w/.-]+\.(?:py|md|json|sh))`", page.read_text()
    )
    return [n for n in names if not re.search("NAME|MODEL_TYPE", n)]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    assert [n for n in places(page) if not (ROOT / n).exists()] == []
