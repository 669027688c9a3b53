"""What may happen between two runs: files as a power cut leaves them, disks that fill up, sources that change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints

import awq_jax
from awq_jax import errors
from awq_jax.convert.files import manifest, shards
from awq_jax.stream import parts
from awq_jax.stream.hidden_states import InMemory
from awq_jax.stream.job import Job, Options, prepare

TOKENS = np.random.default_rng(1).integers(0, 256, (6, 16)).astype(np.int32)
# Rounding to nearest takes the least compilation; which numbers are written does not matter here.
FAST = {"calib": TOKENS, "group_size": 16, "method": "rtn", "progress": False, "batch_size": 4}
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 4, "num_hidden_layers": 3}


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("faults") / "float"
    tiny_checkpoints.checkpoint(directory, seed=3, **SIZES)
    return directory


@pytest.fixture(scope="module")
def left(checkpoint):
    """What a run leaves that is killed when it has written three blocks of five, and the result of a whole one."""
    out = checkpoint.parent / "out"
    with pytest.MonkeyPatch.context() as patch:
        write = parts.write_file
        count = iter(range(100))

        def killed(*args):
            if next(count) == 3:
                raise Killed
            return write(*args)

        patch.setattr(parts, "write_file", killed)
        with pytest.raises(Killed):
            quantize(checkpoint, out, hidden="disk")
    work = out.with_name(".out.quantizing")
    kept = work.rename(work.with_name("left"))
    quantize(checkpoint, out)
    return kept, files(out)


def quantize(checkpoint, dst, **options):
    return awq_jax.quantize_checkpoint(checkpoint, dst, **{**FAST, **options})


def files(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir()}


@pytest.fixture
def work(left, tmp_path):
    """A copy of what the killed run left, for the target ``tmp_path / "out"``."""
    return Path(shutil.copytree(left[0], tmp_path / ".out.quantizing"))


def cut(path: Path, n: int) -> None:
    path.write_bytes(path.read_bytes()[:n])


def stray(work: Path) -> None:
    (work / "part-00004.safetensors").write_bytes(b"of another time")
    (work / "x.tmp").write_bytes(b"half")
    (work / "out").mkdir()
    (work / "out" / "model-00009-of-00009.safetensors").write_bytes(b"half")


def append(work: Path, data: bytes) -> None:
    with (work / manifest.NAME).open("ab") as f:
        f.write(data)


DAMAGE = {
    "nothing": (lambda w: None, 3),
    "part cut": (lambda w: cut(w / "part-00002.safetensors", -9), 2),
    "part empty": (lambda w: cut(w / "part-00001.safetensors", 0), 1),
    "part lost": (lambda w: (w / "part-00000.safetensors").unlink(), 0),
    "half a line": (lambda w: cut(w / manifest.NAME, -40), 2),
    "line without its end": (lambda w: cut(w / manifest.NAME, -1), 2),
    "zeros": (lambda w: append(w, bytes(64)), 3),
    "garbage": (lambda w: append(w, b"\xff\xfe\x00{"), 3),
    "a line of something else": (lambda w: append(w, b'{"bytes": 7}\n'), 3),
    "manifest of zeros": (lambda w: (w / manifest.NAME).write_bytes(bytes(999) + b"\n\n"), 0),
    "manifest empty": (lambda w: cut(w / manifest.NAME, 0), 0),
    "stray files": (stray, 3),
    "hidden states cut": (lambda w: cut(w / "hidden" / "hidden-00003.bin", -1), 3),
    "hidden states lost": (lambda w: shutil.rmtree(w / "hidden"), 3),
}


OFTEN = ("nothing", "part cut", "part lost", "line without its end", "garbage", "stray files", "hidden states cut")


@pytest.mark.parametrize("what", [w if w in OFTEN else pytest.param(w, marks=pytest.mark.slow) for w in DAMAGE])
def test_what_a_power_cut_leaves_is_made_again(checkpoint, left, work, tmp_path, what):
    damage, kept = DAMAGE[what]
    damage(work)
    done = quantize(checkpoint, tmp_path / "out", hidden="disk")
    assert done.resumed == kept
    assert files(tmp_path / "out") == left[1]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_line_without_its_end_does_not_spoil_the_next(checkpoint, left, work, tmp_path):
    """Killed again right after: what came after the damaged line still counts."""
    cut(work / manifest.NAME, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_sync_directory", lambda _: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            quantize(checkpoint, tmp_path / "out")
    assert quantize(checkpoint, tmp_path / "out").resumed == 6
    assert files(tmp_path / "out") == left[1]


def test_what_needs_no_hidden_states_does_not_make_them_again(checkpoint, left, work, tmp_path):
    """Killed when all layers are done: the float head is only carried through."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        write = parts.write_file

        def killed(path, *args):
            if path.name == "part-00004.safetensors":
                raise Killed
            write(path, *args)

        patch.setattr(parts, "write_file", killed)
        with pytest.raises(Killed):
            quantize(checkpoint, out)
        patch.undo()
        patch.setattr(InMemory, "get", lambda *_: pytest.fail("hidden states are read"))
        assert quantize(checkpoint, out).resumed == 4
    assert files(out) == left[1]


def test_hidden_states_may_move_between_runs(checkpoint, left, work, tmp_path):
    """Where they are kept decides nothing, so a run on the disk is continued in memory."""
    assert quantize(checkpoint, tmp_path / "out", hidden="memory").resumed == 3
    assert files(tmp_path / "out") == left[1]


def rewritten(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def one_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


SOURCES = {
    "a weight of the same size": lambda d: rewritten(d / "model.safetensors", one_bit),
    "config": lambda d: rewritten(
        d / "config.json", lambda t: t.replace(b'"rms_norm_eps": 1e-05', b'"rms_norm_eps": 1e-06')
    ),
    "the tokenizer": lambda d: rewritten(d / "tokenizer.json", lambda t: t + b" "),
    "only a time": lambda d: os.utime(d / "model.safetensors", ns=(0, 1)),
    "another file": lambda d: (d / "extra.json").write_text("{}"),
}


@pytest.mark.parametrize("what", SOURCES)
def test_a_source_that_changed_is_refused(checkpoint, tmp_path, what):
    source = Path(shutil.copytree(checkpoint, tmp_path / "float"))
    job = prepare(source, tmp_path / "out", TOKENS, Options(batch_size=4), settings())
    with manifest.opened(job.work, job.fingerprint()):
        pass
    assert job.unfinished()
    SOURCES[what](source)
    for options in ({}, {"resume": True}):
        with pytest.raises(errors.CheckpointError, match=r"had other source;.*restart=True"):
            quantize(source, tmp_path / "out", **options)
    assert job.work.is_dir()


def settings():
    return {k: v for k, v in FAST.items() if k in ("group_size", "method")}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"bits": 3}, "settings"),
        ({"group_size": 32}, "settings"),
        ({"skip": "o_proj"}, "settings"),
        ({"overrides": [("o_proj", {"bits": 8})]}, "settings"),
        ({"symmetric": True}, "settings"),
        ({"explicit_scale": True}, "settings"),
        ({"dtype": "float16"}, "settings"),
        ({"hidden_dtype": "float16"}, "settings"),
        ({"calib": TOKENS[:, :8].copy()}, "calibration data"),
        ({"calib": TOKENS + 1}, "calibration data"),
        ({"bits": 3, "calib": TOKENS + 1}, "settings and other calibration data"),
    ],
)
def test_other_settings_are_refused(checkpoint, work, tmp_path, change, what):
    before = files(work / "hidden"), (work / manifest.NAME).read_bytes()
    with pytest.raises(errors.CheckpointError, match=f"had other {what};"):
        quantize(checkpoint, tmp_path / "out", **change)
    assert (files(work / "hidden"), (work / manifest.NAME).read_bytes()) == before


def test_another_program_is_refused(checkpoint, work, tmp_path, monkeypatch):
    monkeypatch.setattr("awq_jax.stream.job.__version__", "9.9")
    with pytest.raises(errors.CheckpointError, match="had other environment;"):
        quantize(checkpoint, tmp_path / "out")


def test_the_format_may_still_change(checkpoint, work, tmp_path):
    """It is chosen when all blocks are there, and no block is made again for it."""
    done = quantize(checkpoint, tmp_path / "out", format="awq-jax")
    assert (done.format, done.resumed) == ("awq-jax", 3)


@pytest.fixture
def disk(tmp_path):
    """A function that makes a file system of so many MiB in memory, or gives it another size: where it is."""
    where = tmp_path / "disk"
    where.mkdir()

    def size(mib: int) -> Path:
        option = f"{'remount,' if os.path.ismount(where) else ''}size={mib}m"
        command = ["mount", "-t", "tmpfs", "-o", option, "none", str(where)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system is not permitted here")
        return where

    if not shutil.which("mount") or not hasattr(os, "geteuid") or os.geteuid():
        pytest.skip("mounting a file system takes root")
    yield size
    subprocess.run(["umount", str(where)], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["memory", "disk"])
def test_a_disk_that_fills_up(checkpoint, left, disk, hidden):
    """Refused beforehand if it is small; if its space goes while it runs, stopped, and continued with more of it."""
    where = disk(32)
    with pytest.raises(errors.CheckpointError, match=r"GiB free, and the run needs at least .* free some space"):
        quantize(checkpoint, where / "out", hidden=hidden)
    assert not list(where.iterdir())
    disk(128)
    checked = Job.check_space
    stopped, resumed = [], []
    for room in range(0, 1 << 20, 12 << 10):
        with pytest.MonkeyPatch.context() as patch:

            def vanish(job, room=room):
                checked(job)
                with (where / "filler").open("wb") as f:
                    f.write(bytes(shutil.disk_usage(where).free - room))

            patch.setattr(Job, "check_space", vanish)
            try:
                resumed.append(quantize(checkpoint, where / "out", hidden=hidden).resumed)
            except errors.CheckpointError as e:
                stopped.append(str(e))
            finally:
                (where / "filler").unlink()
        if resumed:
            break
        assert not (where / "out").exists()
    assert len(stopped) > 4, "the disk was full at too few places"
    for text in stopped:
        assert f"cannot write {where / 'out'}" in text
        assert "No space left" in text
        assert "run the same command again" in text
    assert resumed[0] >= 3
    assert files(where / "out") == left[1]
    assert [p.name for p in where.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_full_disk_and_the_command(checkpoint, left, disk, tmp_path):
    """In a process of its own: its last line says what to do; the disk is made larger, and it does it."""
    where = disk(128)
    np.save(tmp_path / "tokens.npy", TOKENS)
    argv = [
        sys.executable,
        "-m",
        "awq_jax.cli",
        "quantize",
        str(checkpoint),
        str(where / "out"),
        "--calib",
        str(tmp_path / "tokens.npy"),
        "--quiet",
    ]
    argv += ["--group-size", "16", "--method", "rtn", "--batch-size", "4", "--hidden", "disk", "--json"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    lines = where / ".out.quantizing" / manifest.NAME
    while process.poll() is None and not (lines.exists() and lines.read_bytes().count(b"\n") > 1):
        pass
    subprocess.run(["mount", "-t", "tmpfs", "-o", "remount,size=60k", "none", str(where)], check=True)
    _, text = process.communicate()
    if process.returncode == 0:
        pytest.skip("it was done before the disk was full")
    assert process.returncode == 2, text
    assert "Traceback" not in text
    assert f"cannot write {where / 'out'}" in text.splitlines()[-1]
    again = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert again.returncode != 0
    assert "free some space or choose another disk" in again.stderr
    disk(128)
    again = subprocess.run([*argv, "--resume"], capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["resumed"] >= 1
    assert files(where / "out") == left[1]
