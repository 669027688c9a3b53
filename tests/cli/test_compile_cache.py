"""Compiled programs on disk: who finds them, what becomes of damaged ones, and that they stay within their bound."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_checkpoints

from awq_jax.cli import entry
from awq_jax.devices import compile_cache
from awq_jax.errors import ConfigError

# What JAX says of its cache while one command runs, and the bits of what a program computes.
COMMAND = """
import collections, json, sys
from awq_jax.cli import entry
import jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rpartition("/")[2]]))
code = entry.main(sys.argv[1:])
import numpy as np, awq_jax
logits = np.asarray(awq_jax.load(sys.argv[2])([[1, 2, 3]]))
print(json.dumps({"code": code, "bits": logits.tobytes().hex(), **events}), file=sys.stderr)
"""
PROGRAMS = """
import sys, awq_jax
place = awq_jax.cache_programs(sys.argv[1], int(sys.argv[2]))
assert place == awq_jax.cache_programs(sys.argv[1], int(sys.argv[2]))
import jax, jax.numpy as jnp
for i in range(int(sys.argv[3]), int(sys.argv[4])):
    assert int(jax.jit(lambda x: (x @ x).sum() + i)(jnp.ones((4, 4), jnp.int32))) == 64 + i
print(place)
"""


def environment(caches: Path) -> dict[str, str]:
    """As a user has it: without the cache of this test run."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "JAX_ENABLE"))}
    return own | {"XDG_CACHE_HOME": str(caches)}


def run(caches: Path, *arguments: str) -> dict[str, object]:
    """One command in a fresh process: its output, what it said, and what JAX counted."""
    command = [sys.executable, "-c", COMMAND, *arguments]
    done = subprocess.run(command, env=environment(caches), capture_output=True, text=True, check=True)
    *said, counted = done.stderr.splitlines()
    return {"text": done.stdout, "said": [s for s in said if "programs" in s], **json.loads(counted)}


def entries(caches: Path) -> list[Path]:
    return sorted((caches / "awq_jax" / "programs").glob("*/*-cache"))


@pytest.mark.slow
def test_the_second_command_compiles_nothing_and_damage_is_compiled_anew(tmp_path: Path) -> None:
    model, caches = tmp_path / "model", tmp_path / "caches"
    tiny_checkpoints.checkpoint(model)
    generate = ("generate", str(model), "ab", "--max-new-tokens", "3")
    cold, warm = run(caches, *generate), run(caches, *generate)
    assert cold["code"] == warm["code"] == 0
    assert (cold["cache_misses"], warm["cache_hits"]) == (len(entries(caches)), cold["cache_misses"])
    assert "cache_misses" not in warm
    assert (warm["text"], warm["bits"]) == (cold["text"], cold["bits"])

    first, second, *_ = entries(caches)
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    second.write_bytes(b"not a program")
    damaged = run(caches, *generate)
    assert (damaged["code"], damaged["text"], damaged["bits"]) == (0, cold["text"], cold["bits"])
    [line] = damaged["said"]  # type: ignore[misc]
    assert "it is emptied" in line


def test_processes_that_write_at_once_stay_within_the_bound(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    most = 16_000
    start = [sys.executable, "-W", "error", "-c", PROGRAMS, str(tmp_path), str(most)]
    commands = [[*start, first, last] for first, last in ("06", "39")]
    env = environment(tmp_path)
    processes = [subprocess.Popen(c, env=env, stdout=subprocess.PIPE, text=True) for c in commands]
    [place, other] = [Path(p.communicate()[0].strip()) for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert place == other
    sizes = [f.stat().st_size for f in place.glob("*-cache")]
    assert 2 * len(sizes) == len(list(place.glob("*-[ac]*e")))  # each with the time of its last use
    assert 0 < sum(sizes) <= most
    assert len(sizes) < 9  # else nothing was evicted


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What would be set, of a process in which nothing has been decided."""
    found: dict[str, object] = {}
    monkeypatch.setattr(compile_cache, "_set", lambda **given: found.update(given))
    monkeypatch.setattr(compile_cache, "_decided", lambda: None)
    return found


def test_what_a_killed_process_left_goes(tmp_path: Path, settings: dict[str, object]) -> None:
    place = compile_cache.cache_programs(tmp_path / "p")
    assert place is not None
    for name in ("a-cache", "a-atime", "b-cache", "c-atime"):
        (place / name).write_bytes(b"12345678")
    assert compile_cache.cache_programs(tmp_path / "p") == place
    assert {f.name for f in place.iterdir()} - {".lockfile"} == {"a-cache", "a-atime"}
    assert settings["jax_compilation_cache_dir"] == str(place)


def test_folders_of_other_processors_count_and_the_oldest_go_first(tmp_path: Path, settings: dict[str, object]) -> None:
    old, new, foreign = (tmp_path / name for name in (
        "jax-0.9.0-jaxlib-0.9.0-0123456789ab", "jax-0.10.2-jaxlib-0.10.2-ba9876543210", "mine"))  # fmt: skip
    for i, folder in enumerate((old, new, foreign)):
        folder.mkdir()
        (folder / "a-cache").write_bytes(bytes(600))
        os.utime(folder / "a-cache", (time.time() - 1000 + i,) * 2)
    assert compile_cache.cache_programs(tmp_path, 2000)
    assert not old.exists()
    assert new.exists()
    assert foreign.exists()
    assert settings["jax_compilation_cache_max_size"] == 1000


def test_another_processor_has_another_folder(
    tmp_path: Path, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = compile_cache.cache_programs(tmp_path)
    assert here == compile_cache.cache_programs(tmp_path)
    monkeypatch.setattr(compile_cache, "_processor", lambda: ["flags : fpu avx512f"])
    assert here != compile_cache.cache_programs(tmp_path)


def test_a_directory_that_cannot_be_used_is_one_line(
    tmp_path: Path, settings: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    with caplog.at_level("INFO", "awq_jax"):
        assert compile_cache.cache_programs(tmp_path / "file") is None
        assert compile_cache.cache_programs(tmp_path / "shared") is None
    first, second = caplog.messages
    assert "file" in first
    assert "other users may write" in second
    assert not settings


def test_a_directory_that_the_user_has_named_stays(tmp_path: Path) -> None:
    # This run has one in the environment (see tests/conftest.py).
    assert compile_cache.cache_programs(tmp_path) is None
    assert not any(tmp_path.iterdir())


def test_the_bound_is_positive(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_bytes"):
        compile_cache.cache_programs(tmp_path, 0)


def test_no_cache_refuses_any(settings: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["inspect", str(tmp_path), "--no-cache"]) == 2  # there is nothing to inspect
    assert settings == {"jax_enable_compilation_cache": False}


@pytest.mark.parametrize("command", ["quantize", "generate", "bench"])
def test_help_names_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        entry.main([*command.split(), "--help"])
    assert "~/.cache/awq_jax/programs" in " ".join(capsys.readouterr().out.split())
