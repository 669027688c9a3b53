"""The package installs whole, under its own name, and its public names are what they say."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import awq_jax

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
WHERE = {"awq_jax.kernels": ROOT / "kernels", "awq_jax.convert": ROOT / "convert"}


def test_every_package_directory_is_listed() -> None:
    found = {"awq_jax.kernels", "awq_jax.convert"}
    for top, name in ((ROOT / "awq_jax", "awq_jax"), *((d, n) for n, d in WHERE.items())):
        found |= {".".join([name, *p.parent.relative_to(top).parts]) for p in top.rglob("*.py")}
    assert set(SETUPTOOLS["packages"]) == found
    assert {n: ROOT / d for n, d in SETUPTOOLS["package-dir"].items() if n in WHERE} == WHERE


def test_nothing_is_installed_beside_awq_jax(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, awq_jax.kernels, awq_jax.convert\n"
        "assert u.find_spec('kernels') is None and u.find_spec('convert') is None"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_importing_the_package_does_not_import_jax(tmp_path: Path) -> None:
    code = "import sys, awq_jax; assert 'jax' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_partition_is_the_former_name_of_trainable() -> None:
    assert awq_jax.partition is awq_jax.trainable


@pytest.mark.parametrize("name", awq_jax.__all__)
def test_public_names_resolve_and_are_documented(name: str) -> None:
    value = getattr(awq_jax, name)
    assert value.__doc__
    again = getattr(awq_jax, name)
    assert again is value  # a submodule of the same name would have taken its place
