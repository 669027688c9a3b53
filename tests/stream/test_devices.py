"""Several devices and several processes: the bits of one, and an end for all when one process dies."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import simulated_devices
import tiny_checkpoints
from devices_driver import FAST, sums_are_ordered
from jax.sharding import Mesh

import awq_jax
from awq_jax import errors
from awq_jax.calibration import calibration
from awq_jax.cli import entry
from awq_jax.devices import pool, team
from awq_jax.devices.team import Team
from awq_jax.stream.hidden_states import InMemory, OnDisk

TOKENS = np.random.default_rng(1).integers(0, 256, (11, 16)).astype(np.int32)
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 4, "num_hidden_layers": 3}
OPTIONS = ["--group-size", "16", "--method", "awq", "--no-clip", "--batch-size", "1", "--quiet", "--json"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with a checkpoint, tokens, and what the command makes of them on one device."""
    directory = tmp_path_factory.mktemp("devices")
    tiny_checkpoints.checkpoint(directory / "float", seed=3, **SIZES)
    np.save(directory / "tokens.npy", TOKENS)
    assert entry.main(command(directory, directory / "one")) == 0
    return directory


def command(directory: Path, out: Path) -> list[str]:
    return ["quantize", str(directory / "float"), str(out), "--calib", str(directory / "tokens.npy"), *OPTIONS]


def files(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir()}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


def start(directory: Path, out: Path, count: int, devices: int) -> list[subprocess.Popen[str]]:
    """The command in ``count`` processes of ``devices`` devices each."""
    port = free_port()

    def one(rank: int) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "awq_jax", *command(directory, out)]
        argv += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count), "--process-id", str(rank)]
        pipe = subprocess.PIPE
        return subprocess.Popen(argv, env=simulated_devices.environment(devices), stdout=pipe, stderr=pipe, text=True)

    return [one(rank) for rank in range(count)]


def finished_blocks(out: Path) -> int:
    manifest = out.with_name(f".{out.name}.quantizing") / "manifest.jsonl"
    return len(manifest.read_text().splitlines()) - 1 if manifest.is_file() else 0


def test_eight_devices_make_the_bits_of_one(made, tmp_path):
    driver = Path(__file__).parents[1] / "helpers" / "devices_driver.py"
    argv = [sys.executable, str(driver), str(made / "float"), str(made / "tokens.npy"), str(tmp_path)]
    done = subprocess.run(argv, env=simulated_devices.environment(8), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"devices": 8, "sums": True}
    assert files(tmp_path / "eight") == files(tmp_path / "one") == files(tmp_path / "whole")
    assert files(tmp_path / "eight")["model.safetensors"] == files(made / "one")["model.safetensors"]


def kill_and_continue(made: Path, out: Path, victim: int) -> str:
    """SIGKILL one of two processes in the middle, and run both again: what the survivor had to say."""
    running = start(made, out, 2, 4)
    try:
        deadline = time.monotonic() + 240
        while finished_blocks(out) < 2 and all(p.poll() is None for p in running) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert [p.poll() for p in running] == [None, None]
        running[victim].send_signal(signal.SIGKILL)
        began = time.monotonic()
        survivor = running[1 - victim]
        _, said = survivor.communicate(timeout=60)
        assert time.monotonic() - began < team.GRACE + 5
        assert survivor.returncode == team.EXIT, said
    finally:
        for p in running:
            p.kill()
            p.communicate()
    assert not out.exists()
    assert finished_blocks(out) >= 2
    again = start(made, out, 2, 4)
    told = [p.communicate(timeout=240) for p in again]
    assert [p.returncode for p in again] == [0, 0], told
    assert json.loads(told[0][0])["resumed"] >= 2
    assert told[1][0] == ""  # only the first process speaks
    assert files(out) == files(made / "one")
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    return said


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_both_continue(made, tmp_path):
    said = kill_and_continue(made, tmp_path / "out", victim=1)
    assert "awq-jax: error: process 1 died" in said
    assert "Run the same command again in every process" in said


@pytest.mark.slow
def test_so_does_the_first_process_which_jax_depends_on(made, tmp_path):
    said = kill_and_continue(made, tmp_path / "out", victim=0)
    assert "awq-jax: error: process 0 died" in said


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["memory", "disk"])
def test_a_run_continues_on_another_number_of_devices(made, tmp_path, hidden):
    out = tmp_path / "out"
    running = start(made, out, 2, 4)
    while finished_blocks(out) < 2 and all(p.poll() is None for p in running):
        time.sleep(0.02)
    for p in running:
        p.kill()
        p.communicate()
    done = awq_jax.quantize_checkpoint(made / "float", out, TOKENS, hidden=hidden, **FAST)
    assert done.resumed >= 2
    assert files(out)["model.safetensors"] == files(made / "one")["model.safetensors"]


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others(made, tmp_path):
    """Here one that finds other calibration data."""
    np.save(tmp_path / "other.npy", TOKENS[::-1])
    port, running = free_port(), []
    for rank, tokens in enumerate((made / "tokens.npy", tmp_path / "other.npy")):
        argv = [sys.executable, "-m", "awq_jax", *command(made, tmp_path / "out")]
        argv[argv.index("--calib") + 1] = str(tokens)
        argv += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id", str(rank)]
        running.append(subprocess.Popen(argv, env=simulated_devices.environment(2), stderr=subprocess.PIPE, text=True))
    said = [p.communicate(timeout=240)[1] for p in running]
    assert {p.returncode for p in running} <= {2, team.EXIT}
    assert all("process 1 has other calibration data than process 0" in s for s in said)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_grams_do_not_depend_on_the_number_of_threads():
    code = """
import jax, numpy as np, hashlib
from awq_jax.calibration.calibration import batch_sums
x = np.random.default_rng(0).standard_normal((2048, 512)).astype(np.float32)
for k in (32, 64, 96, 128, 256, 512):
    print(hashlib.sha256(np.asarray(jax.jit(batch_sums)(x[:, :k]).gram).tobytes()).hexdigest())
"""
    seen = set()
    for threads in (2, 8, 64):
        env = simulated_devices.environment(1) | {"PJRT_NPROC": str(threads)}
        seen.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout)
    assert len(seen) == 1
    assert len(seen.pop().split()) == 6


@pytest.mark.parametrize("shape", [(300, 5), (2, 257, 8), (128, 4), (300, 513)])
def test_slabs_hold_the_same_sums(shape):
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    x[..., 7, 0] = np.nan
    got = jax.jit(calibration.batch_sums)(x)
    clean = np.where(np.isfinite(x).all(axis=-1, keepdims=True), x, 0).astype(np.float64)
    np.testing.assert_allclose(got.gram, np.swapaxes(clean, -1, -2) @ clean, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(got.count, np.full(shape[:-2], shape[-2] - 1))
    np.testing.assert_array_equal(got.dropped, np.ones(shape[:-2]))


def test_one_device_adds_in_order():
    assert sums_are_ordered(pool.Pool())
    assert sums_are_ordered(pool.Pool(tuple(jax.devices()[:1])))


def teams(size: int) -> list[Team]:
    """Processes of a run, all in this one."""
    pairs = {r: socket.socketpair() for r in range(1, size)}
    return [
        Team(0, size, {r: a for r, (a, _) in pairs.items()}),
        *(Team(r, size, {0: b}) for r, (_, b) in pairs.items()),
    ]


def in_threads(*jobs):
    """What each job returns or raises."""
    results = [None] * len(jobs)

    def run(i):
        try:
            results[i] = jobs[i]()
        except errors.ProcessError as e:
            results[i] = e

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(10)
    return results


@pytest.fixture
def no_end(monkeypatch):
    """The test's own process is not ended."""
    ended = []
    monkeypatch.setattr(team, "GRACE", 0.1)
    monkeypatch.setattr(team, "_end", ended.append)
    yield ended
    time.sleep(0.2)  # for those who are still to be ended


def test_processes_gather_in_order_and_leave(no_end):
    three = teams(3)
    for n in range(3):
        got = in_threads(*(lambda t=t, n=n: t.gather(f"{t.rank}-{n}") for t in reversed(three)))
        assert got == [[f"{r}-{n}" for r in range(3)]] * 3
    for t in three:
        t.close()
    time.sleep(0.3)
    assert (no_end, [t.lost for t in three]) == ([], ["", "", ""])


@pytest.mark.parametrize("victim", [0, 2])
def test_a_lost_process_is_an_error_in_all_others(no_end, victim):
    three = teams(3)
    three[victim]._closed = True  # the dead tell nobody that they miss the others
    for link in three[victim]._links.values():
        link.shutdown(socket.SHUT_RDWR)
    others = [t for t in three if t.rank != victim]
    got = in_threads(*(t.gather for t in others))
    assert all(re.match(rf"process {victim} died.*Run the same command again", str(e)) for e in got)
    assert others[0].wait_for_loss()
    for t in others:
        t.close()


def test_an_error_is_told_and_who_waits_elsewhere_is_ended(no_end):
    two = teams(2)
    two[1].close("the disk is full")
    (error,) = in_threads(two[0].gather)
    assert "process 1 stopped: the disk is full. Run the same" in str(error)
    time.sleep(0.5)  # as if it never came back from there
    assert len(no_end) == 1
    assert "process 1 stopped" in no_end[0]


def test_numbers_of_processes_are_checked():
    for args, message in [
        (("host:1", 2, None), "give all three"),
        (("host", 2, 0), "HOST:PORT"),
        (("host:1", 2, 2), "process id 2 is not one of 0 to 1"),
        (("host:1", 2, -1), "process id -1"),
    ]:
        with pytest.raises(errors.ConfigError, match=message):
            team.join(*args)


def test_meshes_are_checked(made, tmp_path, capsys):
    def mesh(**device):
        made_of = SimpleNamespace(**{"platform": "cpu", "process_index": 0, **device})
        return SimpleNamespace(devices=np.array([made_of], object))

    with pytest.raises(errors.ConfigError, match=r"the mesh has devices of tpu.*make the mesh of jax.devices"):
        pool.pool_of(mesh(platform="tpu"), None)
    with pytest.raises(errors.ConfigError, match="of other processes"):
        pool.pool_of(mesh(process_index=1), None)
    with pytest.raises(errors.ConfigError, match="no device of process 1"):
        pool.pool_of(mesh(), SimpleNamespace(size=2, rank=0))
    assert pool.pool_of(Mesh(np.asarray(jax.devices()[:1]), ("x",)), None).devices == tuple(jax.devices()[:1])
    assert entry.main([*command(made, tmp_path / "out"), "--devices", "99"]) == 2
    assert "--devices 99: there are" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("disk", [False, True])
def test_hidden_states_of_some_batches(tmp_path, disk):
    """Each process keeps those of its own batches, by the numbers that they have among all."""
    batches = [TOKENS[i : i + 1] for i in range(5)]
    own = OnDisk(tmp_path, batches, [1, 4], "float32", 3) if disk else InMemory(batches)
    assert own.batches == 5
    np.testing.assert_array_equal(own.get(4), batches[4])
    for seed in range(2):
        rng = np.random.default_rng(seed)
        made = {i: rng.random((*batches[i].shape, 3), np.float32) for i in (1, 4)}
        for i, value in made.items():
            own.put(i, value)
        own.advance()
        for i, value in made.items():
            np.testing.assert_array_equal(own.get(i), value)
