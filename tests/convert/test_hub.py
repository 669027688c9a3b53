"""Pushing, against a stand-in of the hub's API, from a fresh process: its library reads the address at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz
import hub_stand_in
import pytest

from awq_jax import cli
from awq_jax.convert import hub
from awq_jax.convert.writing import write_checkpoint
from awq_jax.errors import ConfigError

# Each line of the input: a token, and a command or a call. One process for all: it is JAX that takes time to import.
DRIVER = """
import contextlib, io, json, os, sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # huggingface_hub waits between attempts
import awq_jax
from awq_jax import cli
results = []
for token, what in json.load(sys.stdin):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(what) if isinstance(what, list) else awq_jax.load(what["load"]).push_to_hub(**what["push"])
        except awq_jax.errors.CheckpointError as e:
            code = str(e)
    results.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[hub_stand_in.Hub]:
    with hub_stand_in.running() as running:
        yield running


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("push")
    write_checkpoint(directory / "packed", fuzz.weights(bits=4).items(), fuzz.llama_config(64, 128), "gemm")
    return directory / "packed"


@pytest.fixture(scope="module")
def done(server: hub_stand_in.Hub, source: Path) -> dict[str, tuple[Any, str, str]]:
    """What each of these came to."""
    to = ["--to", "compressed-tensors", "--quiet"]

    def convert(name: str, repo: str, *more: str) -> list[str]:
        return ["convert", str(source), str(source.parent / name), *to, "--push", repo, *more]

    quantize = ["quantize", str(source), str(source.parent / "quantized"), "--push", "me/new"]
    cases: dict[str, tuple[str, Any]] = {
        "sent": ("good", convert("sent", "new", "--private", "--push-branch", "w4", "--json")),
        "nobody": ("", convert("nobody", "me/new")),
        "nobody quantizes": ("", quantize),
        "unknown": ("wrong", convert("unknown", "me/new")),
        "reads": ("reads", convert("reads", "me/new")),
        "else": ("good", convert("else", "else/new")),
        "closed": ("good", convert("closed", "me/closed")),
        "late": ("good", convert("late", "me/late", "--push-branch", "w4")),
        "halfway": ("good", convert("halfway", "me/halfway")),
        "model": ("good", {"load": str(source), "push": {"repo": "org/new", "dst": str(source.parent / "model")}}),
        "temporary": ("good", {"load": str(source), "push": {"repo": "me/late", "private": True}}),
    }
    temporary = source.parent / "tmp"
    temporary.mkdir()
    places = {"HF_ENDPOINT": server.address, "HF_HOME": str(source.parent / "home"), "TMPDIR": str(temporary)}
    env = {
        **os.environ,
        **places,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
    }
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(list(cases.values())), env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return dict(zip(cases, map(tuple, json.loads(ran.stdout)), strict=True))


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_what_was_written_arrives(done: dict[str, Any], server: hub_stand_in.Hub, source: Path) -> None:
    code, out, err = done["sent"]
    assert code == 0, err
    assert json.loads(out)["written"] == str(source.parent / "sent")  # one object, and nothing else
    assert f"pushed to {server.address}/me/new" in err
    repo, branch, sent = server.commits[0]
    assert (repo, branch) == ("me/new", "w4")
    assert sent == files(source.parent / "sent")
    assert {"README.md", "config.json", "model.safetensors"} <= set(sent)
    asked = server.created[0]
    assert asked.get("visibility") == "private" or asked.get("private") is True  # newer and older libraries
    assert "private" not in str(server.created[-2:-1])  # where it was not asked for
    assert "POST /api/models/me/new/branch/w4" in server.log


def test_a_model_pushes_itself(done: dict[str, Any], server: hub_stand_in.Hub, source: Path) -> None:
    assert done["model"][0].startswith(server.address)
    assert server.commits[-1] == ("org/new", "main", files(source.parent / "model"))


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("nobody", "nothing can be pushed to me/new, as the hub does not know who you are: LocalTokenNotFound"),
        ("nobody quantizes", "Log in with `hf auth login`, or set HF_TOKEN"),
        ("unknown", "as the hub does not know who you are: "),
        ("reads", "the token of me may only read; pushing to me/new needs one that may write"),
        ("else", "me cannot create else/new: that is neither theirs nor of an organization of theirs"),
        ("closed", "me may not write to me/closed: "),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_work(
    done: dict[str, Any], source: Path, case: str, told: str
) -> None:
    code, out, err = done[case]
    assert (code, out) == (2, "")
    assert told in err
    assert not [p for p in source.parent.iterdir() if case.split()[-1].rstrip("s") in p.name]


@pytest.mark.parametrize(("case", "status"), [("late", "403"), ("halfway", "500")])
def test_a_failed_upload_leaves_a_whole_copy(done: dict[str, Any], source: Path, case: str, status: str) -> None:
    code, out, err = done[case]
    assert code == 2
    assert "exactly those of the source" in out  # what the conversion came to is said all the same
    assert f"{source.parent / case} is whole, but was not sent to me/{case}: " in err
    assert status in err
    branch = " --revision w4" if case == "late" else ""
    assert err.rstrip().endswith(f"To send it again: hf upload me/{case} {source.parent / case}{branch}")
    assert files(source.parent / case) == files(source.parent / "sent")


def test_a_temporary_copy_is_kept_if_it_did_not_arrive(done: dict[str, Any], source: Path) -> None:
    (kept,) = (source.parent / "tmp").glob("awq_jax-*")
    assert f"hf upload me/late {kept / 'late'} --private" in done["temporary"][0]
    assert files(kept / "late") == files(source.parent / "model")


def test_options_and_names_that_make_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for repo in ("", "a/b/c", "../x", "a b"):
        with pytest.raises(ConfigError, match="not a repository of the hub"):
            hub.check(repo)
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "x"), "--to", "float", "--private"]) == 2
    assert "give that, too" in capsys.readouterr().err
