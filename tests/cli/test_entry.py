"""Ways into the command line: ``python -m awq_jax``, and ``--revision`` wherever a hub id is taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import awq_jax
from awq_jax.cli import entry
from awq_jax.convert import registry
from awq_jax.convert.formats import float_weights
from awq_jax.errors import CheckpointError, ConfigError

TAKE_HUB_IDS = {
    "quantize": ["owner/name", "out"],
    "convert": ["owner/name", "out", "--to", "float"],
    "eval": ["owner/name", "--text", "builtin"],
    "generate": ["owner/name", "hello"],
    "inspect": ["owner/name", "--check"],
}


def python(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True)


def test_the_module_is_the_command(tmp_path: Path) -> None:
    done = python("-m", "awq_jax", "inspect", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: awq-jax inspect ")
    assert "\nawq-jax inspect: error: " in done.stderr
    assert python("-m", "awq_jax", "--version", cwd=tmp_path).stdout == f"awq-jax {awq_jax.__version__}\n"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Hub ids that would be downloaded."""
    found: list[str] = []

    def download(hub_id: str) -> Path:
        found.append(hub_id)
        raise CheckpointError("offline")

    monkeypatch.setattr(float_weights, "download", download)
    return found


@pytest.mark.parametrize("command", TAKE_HUB_IDS)
def test_a_revision_is_given_as_an_option(
    command: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [command, *TAKE_HUB_IDS[command]]
    assert entry.main([*words, "--revision", "refs/pr/1"]) == 2
    assert asked == ["owner/name@refs/pr/1"]
    (tmp_path / "owner" / "name").mkdir(parents=True)
    capsys.readouterr()
    assert entry.main([*words, "--revision", "v1"]) == 2
    told = capsys.readouterr().err
    assert "--revision v1 is of a repository on the hub, and owner/name is a local path; leave it out" in told
    assert len(asked) == 1


def test_every_command_that_takes_a_checkpoint_has_it() -> None:
    parser = entry.build_parser()
    commands: dict[str, Any] = next(a for a in parser._actions if isinstance(a.choices, dict)).choices  # type: ignore
    positional = {
        n for n, p in commands.items() if {"src", "dir"} & {a.dest for a in p._actions if not a.option_strings}
    }
    assert positional == {n for n, p in commands.items() if "--revision" in p.format_help()} >= set(TAKE_HUB_IDS)


def test_load_and_open_source_take_a_revision(asked: list[str], tmp_path: Path) -> None:
    for given in ("v1.0+cpu", "a" * 40):
        with pytest.raises(CheckpointError, match="offline"):
            awq_jax.load("owner/name", revision=given)
    assert asked == ["owner/name@v1.0+cpu", f"owner/name@{'a' * 40}"]
    for path, revision, told in (
        (tmp_path, "v1", "is a local path; leave it out"),
        ("x.gguf", "v1", "is a local path; leave it out"),
        ("owner/name@v2", "v1", "owner/name@v2 names a revision, and so does"),
        ("owner/name", "", "'' is not the name of a revision"),
        ("owner/name", "a b", "'a b' is not the name"),
    ):
        with pytest.raises(ConfigError, match=told):
            registry.open_source(path, revision=revision)
    assert len(asked) == 2
