"""`awq_jax.quantize_checkpoint`: the bytes of the whole-model path, whatever interrupts it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_checkpoints
from flax import nnx
from safetensors.numpy import load_file, save_file

import awq_jax
from awq_jax import errors, models, paths
from awq_jax.cli import entry
from awq_jax.config import AwqConfig
from awq_jax.convert.files import manifest
from awq_jax.models.weights import params
from awq_jax.quantizer import scale_groups
from awq_jax.stream import decoder_blocks, forecast, job, parts, run
from awq_jax.stream.hidden_states import InMemory, OnDisk, holds
from awq_jax.stream.job import Options, prepare
from awq_jax.stream.session import Done, Session

TOKENS = np.random.default_rng(1).integers(0, 256, (6, 16)).astype(np.int32)
# The least that needs all of calibration, search and rounding: compilation is what takes time here.
FAST = {"group_size": 16, "method": "awq", "clip": False, "n_grid": 2, "progress": False, "batch_size": 4}
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 4, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stream") / "float"
    tiny_checkpoints.checkpoint(directory, seed=3, **SIZES)
    return directory


@pytest.fixture(scope="module")
def whole(checkpoint):
    """What `load`, `quantize` and `save` make of it, and the report."""
    model = awq_jax.load(checkpoint)
    report = model.quantize(TOKENS, **FAST)
    model.save(checkpoint.parent / "whole")
    return checkpoint.parent / "whole", report


def files(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir()}


def quantize(checkpoint, dst, **options):
    return awq_jax.quantize_checkpoint(checkpoint, dst, **{"calib": TOKENS, **FAST, **options})


@pytest.mark.parametrize("hidden", ["memory", "disk"])
def test_the_bytes_are_those_of_the_whole_model_path(checkpoint, whole, tmp_path, hidden):
    done = quantize(checkpoint, tmp_path / "out", hidden=hidden)
    assert files(tmp_path / "out") == files(whole[0])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (done.format, done.resumed) == ("gemm", 0)
    assert done.report.layers == whole[1].layers
    assert done.report.skipped == whole[1].skipped
    assert (done.report.tokens, done.report.bytes_after) == (TOKENS.size, whole[1].bytes_after)


def test_statistics_are_those_of_the_model_run_as_a_whole(checkpoint):
    """Against `awq_jax.calibrate`, which runs all layers in one program and knows no blocks."""
    model = awq_jax.load(checkpoint)
    rows = len(TOKENS)
    fitted, kept = (
        awq_jax.calibrate(model.apply, model.params, [part], include_head=True, progress=False).stats
        for part in (TOKENS[: rows - 1], TOKENS[rows - 1 :])
    )
    session = Session(model.config, AwqConfig(group_size=16, quantize_head=True))
    assert session.plan.to_dict() == awq_jax.discover(model.apply, model.params, TOKENS[:1, :8]).to_dict()
    leaves = paths.flatten(model.params)
    hidden = InMemory(session.arranged([TOKENS[:4], TOKENS[4:]]))
    got: tuple[dict, dict] = {}, {}
    for block in session.blocks:
        seen = session.calibrate(block, {p: leaves[block.prefix + p] for p in block.leaves}, hidden)
        for group, _ in session.work(block):
            for sums, fetch in zip(got, seen, strict=True):
                sums[group.name] = fetch(group.name)
    for sums, want in zip(got, (fitted, kept), strict=True):
        assert sums.keys() == want.keys()
        for name, stats in want.items():
            np.testing.assert_allclose(sums[name].gram, stats.gram, rtol=1e-4, atol=1e-4 * np.abs(stats.gram).max())
            np.testing.assert_array_equal(sums[name].count, stats.count)


def test_a_sequence_that_is_alone_is_judged_by_its_second_half(checkpoint):
    model = awq_jax.load(checkpoint)
    one, half = TOKENS[:1], -(-TOKENS.shape[1] // 2)
    first, whole = (awq_jax.calibrate(model.apply, model.params, [x], progress=False) for x in (one[:, :half], one))
    session = Session(model.config, AwqConfig(group_size=16))
    leaves, hidden = paths.flatten(model.params), InMemory(session.arranged([one]))
    for block in session.blocks:
        seen = session.calibrate(block, {p: leaves[block.prefix + p] for p in block.leaves}, hidden)
        for group, _ in session.work(block):
            fitted, every = np.asarray(first.stats[group.name].gram), np.asarray(whole.stats[group.name].gram)
            close = {"rtol": 1e-3, "atol": 1e-4 * np.abs(every).max()}
            np.testing.assert_allclose(seen.fitted(group.name).gram, fitted, **close)
            np.testing.assert_allclose(seen.kept(group.name).gram, every - fitted, **close)
            assert (seen.fitted(group.name).count, seen.kept(group.name).count) == (half, one.size - half)


def test_a_group_that_is_worse_than_plain_rounding_on_what_is_kept_out_is_rounded_and_named(checkpoint, monkeypatch):
    """Eight tokens whose correlations are taken for true; then with Grams whose memory rounding has used."""
    how = FAST | {"method": "awq+gptq", "bits": 2, "shrinkage": 0.0, "damping": 1e-6}
    rows = []
    for in_place in (scale_groups.IN_PLACE, 1):
        monkeypatch.setattr(scale_groups, "IN_PLACE", in_place)
        report = awq_jax.load(checkpoint).quantize(TOKENS[:1], **how)
        rows.append([(r.path, r.reason, r.kept_out, r.kept_out_rtn) for r in report.layers])
        rounded = [r for r in report.layers if "worse than plain rounding on 8 tokens kept out" in r.reason]
        assert rounded
        assert all(r.kept_out <= 1.1 * r.kept_out_rtn for r in report.layers)
    assert rows[0] == rows[1]


def test_the_time_of_all_that_is_done_with_a_block_is_counted(checkpoint, monkeypatch):
    session = Session(awq_jax.load(checkpoint).config, AwqConfig(group_size=16))
    spent = {"calibrate": 1.0, "search": 2.0, "round": 4.0}
    done = Done(session.blocks[1], {}, [], spent, 0, 0)
    monkeypatch.setattr(session, "calibrate", lambda *_: time.sleep(0.1))
    monkeypatch.setattr(session, "quantize", lambda *_: done)
    monkeypatch.setattr(session, "experts_at_a_time", lambda _: {"experts": 1})
    monkeypatch.setattr(session, "pass_on", lambda *_: time.sleep(0.2))
    (got,) = session.run(session.blocks[1:2], lambda _: time.sleep(0.05), InMemory([np.zeros((1, 4), np.int32)]))
    assert got.seconds["load"] >= 0.05
    assert 1.3 <= got.seconds["calibrate"] < 2
    assert (got.seconds["search"], got.seconds["round"]) == (2, 4)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def killer(monkeypatch, at):
    """The ``at``-th of all writes to parts, manifest lines, hidden states and the result never returns."""
    count = 0

    def counted(function):
        def run(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                raise Killed
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(parts, "write_file", counted(parts.write_file))
    monkeypatch.setattr(manifest.Manifest, "add", counted(manifest.Manifest.add))
    monkeypatch.setattr(OnDisk, "put", counted(OnDisk.put))
    monkeypatch.setattr(parts, "assemble", counted(parts.assemble))
    monkeypatch.setattr(parts, "install", counted(parts.install))


@pytest.mark.parametrize(("hidden", "at"), [("memory", 8), ("disk", 14), ("memory", 13)])
def test_a_run_that_breaks_off_continues_with_the_same_bytes(checkpoint, whole, tmp_path, hidden, at):
    with pytest.MonkeyPatch.context() as patch:
        killer(patch, at)
        with pytest.raises(Killed):
            quantize(checkpoint, tmp_path / "out", hidden=hidden)
    assert not (tmp_path / "out").exists()
    done = quantize(checkpoint, tmp_path / "out", hidden=hidden, resume=True)
    assert done.resumed > 0
    assert files(tmp_path / "out") == files(whole[0])
    assert done.report.layers == whole[1].layers
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_run_killed_when_the_result_was_in_place_is_only_tidied_up(checkpoint, whole, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_tidy", lambda job: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            quantize(checkpoint, tmp_path / "out")
    before = os.stat(tmp_path / "out" / "config.json").st_ino
    done = quantize(checkpoint, tmp_path / "out")
    assert done.report.layers == whole[1].layers
    assert os.stat(tmp_path / "out" / "config.json").st_ino == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def unfinished(checkpoint, tmp_path):
    """A run that broke off after two blocks: its target."""
    with pytest.MonkeyPatch.context() as patch:
        killer(patch, 6)
        with pytest.raises(Killed):
            quantize(checkpoint, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"calib": TOKENS[:5]}, "calibration data"),
        ({"calib": TOKENS[::-1].copy()}, "calibration data"),
        ({"n_grid": 3}, "settings"),
        ({"dtype": "bfloat16"}, "settings"),
        ({"hidden_dtype": "bfloat16"}, "settings"),
        ({"batch_size": 6}, "calibration data"),
    ],
)
def test_another_job_does_not_continue_an_unfinished_run(checkpoint, unfinished, change, what):
    left = files(unfinished.parent / ".out.quantizing")
    with pytest.raises(errors.CheckpointError, match=f"had other {what}.*restart=True"):
        quantize(checkpoint, unfinished, **change)
    assert files(unfinished.parent / ".out.quantizing") == left


def test_a_changed_source_is_refused_and_restart_discards(checkpoint, whole, unfinished, tmp_path):
    source = tmp_path / "copy" / checkpoint.name  # the card says the name
    shutil.copytree(checkpoint, source)
    with pytest.raises(errors.CheckpointError, match="had other source"):
        quantize(source, unfinished)
    assert quantize(source, unfinished, restart=True).resumed == 0
    assert files(unfinished) == files(whole[0])


def test_a_damaged_part_is_made_again(checkpoint, whole, unfinished):
    part = unfinished.parent / ".out.quantizing" / "part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    assert quantize(checkpoint, unfinished).resumed == 1
    assert files(unfinished) == files(whole[0])


def test_resume_needs_something_to_resume(checkpoint, tmp_path):
    with pytest.raises(errors.CheckpointError, match="no unfinished run"):
        quantize(checkpoint, tmp_path / "out", resume=True)
    with pytest.raises(errors.ConfigError, match="one of them"):
        quantize(checkpoint, tmp_path / "out", resume=True, restart=True)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_error_and_the_run_continues(checkpoint, whole, tmp_path):
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    write = parts.write_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "write_file", full)
        with pytest.raises(errors.CheckpointError, match=r"No space left.*run the same command again"):
            quantize(checkpoint, tmp_path / "out")
    assert quantize(checkpoint, tmp_path / "out").resumed == 2
    assert files(tmp_path / "out") == files(whole[0])


def test_a_disk_that_is_too_small_is_refused_before_any_work(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(job.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(errors.CheckpointError, match=r"GiB free, and the run needs"):
        quantize(checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_two_runs_do_not_share_a_target(checkpoint, tmp_path):
    work = prepare(checkpoint, tmp_path / "out", TOKENS, Options(batch_size=4), {"group_size": 16})
    with (
        manifest.opened(work.work, work.fingerprint()),
        pytest.raises(errors.CheckpointError, match="another process is writing"),
    ):
        run.run(work, progress=False)


def test_what_cannot_work_is_refused_before_any_work(checkpoint, whole, tmp_path):
    def refuses(error, match, src=checkpoint, dst=tmp_path / "out", **options):
        with pytest.raises(error, match=match):
            quantize(src, dst, **options)

    refuses(errors.ShapeError, r"layers/2/mlp/down_proj/kernel: 32 rows, group size 64", group_size=64)
    refuses(errors.FormatError, "gemm cannot hold this.*3 bits", bits=3, format="gemm")
    refuses(errors.FormatError, "not written block by block", format="gguf-q4_1")
    refuses(errors.CheckpointError, "is the source", dst=checkpoint, overwrite=True)
    refuses(errors.CheckpointError, "exists", dst=whole[0])
    refuses(errors.ConfigError, "quantized already", src=whole[0])
    refuses(errors.ConfigError, "hidden must be", hidden="clouds")
    refuses(errors.ConfigError, "hidden_dtype must be", hidden_dtype="int8")
    refuses(errors.ConfigError, "nothing would be quantized", skip="kernel")
    refuses(errors.CalibrationError, "outside the vocabulary|has token", calib=TOKENS + 280)
    assert not list(tmp_path.iterdir())


def test_the_command_forecasts_and_continues(checkpoint, whole, tmp_path, capsys):
    np.save(tmp_path / "tokens.npy", TOKENS)
    out = tmp_path / "out"
    argv = ["quantize", str(checkpoint), str(out), "--calib", str(tmp_path / "tokens.npy"), "--quiet"]
    argv += ["--group-size", "16", "--method", "awq", "--no-clip", "--batch-size", "4"]
    assert entry.main([*argv, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["blocks"] == 3
    assert said["memory_total"] == sum(said["memory"].values())
    assert not out.exists()
    assert entry.main([*argv, "--resume"]) == 2
    assert "leave --resume out" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        killer(patch, 6)
        with pytest.raises(Killed):
            entry.main(argv)
    assert entry.main([*argv, "--seed", "0", "--bits", "3", "--quantize-head"]) == 2
    assert "pass --restart" in capsys.readouterr().err
    assert entry.main([*argv, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed"] == 2
    assert sorted(files(out)) == sorted(files(whole[0]))


def test_hidden_states_on_disk_are_those_in_memory(tmp_path):
    batches = [TOKENS[:4], TOKENS[4:]]
    rng = np.random.default_rng(0)
    kept = InMemory(batches, "bfloat16"), OnDisk(tmp_path, batches, range(2), "bfloat16", 8)
    for _ in range(2):
        for i, batch in enumerate(batches):
            value = rng.standard_normal((*batch.shape, 8)).astype(np.float32)
            for h in kept:
                h.put(i, value)
        for h in kept:
            h.advance()
        for i in range(2):
            np.testing.assert_array_equal(kept[0].get(i), kept[1].get(i))
    kept[1].forget(2)
    assert not holds(tmp_path, 1, batches, "bfloat16", 8)
    assert holds(tmp_path, 2, batches, "bfloat16", 8)
    assert not holds(tmp_path, 2, batches, "float32", 8)
    again = OnDisk(tmp_path, batches, range(2), "bfloat16", 8, 2)
    np.testing.assert_array_equal(again.get(1), kept[0].get(1))


def test_nothing_is_compiled_after_the_first_block_of_a_shape(tmp_path):
    """And a skipped layer, whose program has no statistics, costs one more, wherever it is; and so does a group that is
    worse than plain rounding, which none is with as many tokens."""
    directory = tmp_path / "deep"
    tiny_checkpoints.checkpoint(directory, seed=3, **SIZES | {"num_hidden_layers": 9})
    compiled, marks = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    tokens = np.random.default_rng(1).integers(0, 256, (64, 16)).astype(np.int32)
    work = prepare(directory, tmp_path / "out", tokens, Options(batch_size=8), _settings())

    class Bar:
        def update(self, n=1):
            marks.append(len(compiled))

    with manifest.opened(work.work, work.fingerprint()) as done:
        run._quantize(work, done, Bar())
    assert len(marks) == 12  # at the start, embedding, nine layers, head
    assert marks[2] > marks[1]
    assert len(set(marks[2:11])) == 1, marks


def _settings():
    return {k: v for k, v in FAST.items() if k not in ("progress", "batch_size")}


def test_the_forecast_is_of_the_right_size(checkpoint, tmp_path):
    work = prepare(checkpoint, tmp_path / "out", TOKENS, Options(batch_size=4), _settings())
    needs = forecast.forecast(work)
    assert not list(tmp_path.iterdir())
    assert (needs.blocks, needs.parameters) == (3, sum(b.count_elements() for b in work.session.blocks))
    assert needs.memory["hidden states"] == TOKENS.size * 32 * 4
    assert needs.memory["statistics"] == 2 * 4 * 4 * 32 * 32  # and of the sequence kept out
    assert set(needs.seconds) == {"compile", "calibrate", "search", "round"}
    assert all(s >= 0 for s in needs.seconds.values())
    text = forecast.table(needs)
    assert "parameters in 3 layers" in text
    assert "hidden states" in text
    written = run.run(work, progress=False)
    size = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert size <= work.disk() / 2 + 20000  # headers
    assert size > work.disk() / 8
    assert written.format == "gemm"


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}


@pytest.mark.parametrize(
    ("family", "config", "options"),
    [
        ("llama", {"tie_word_embeddings": True}, {"bits": 3, "method": "rtn"}),
        pytest.param("qwen3_moe", MOE, {}, marks=pytest.mark.slow),
        pytest.param("llama", {}, {"quantize_head": True, "explicit_scale": True}, marks=pytest.mark.slow),
        pytest.param("gemma2", {"head_dim": 8}, {"method": "awq+gptq"}, marks=pytest.mark.slow),
    ],
)
def test_other_models_and_formats(tmp_path, family, config, options):
    tiny_checkpoints.checkpoint(tmp_path / "float", family, seed=4, **SIZES | config | {"num_hidden_layers": 2})
    model = awq_jax.load(tmp_path / "float")
    report = model.quantize(TOKENS, **FAST | options)
    format = model.save(tmp_path / "whole")
    done = quantize(tmp_path / "float", tmp_path / "out", **options)
    assert done.format == format
    assert done.report.layers == report.layers
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_plans_found_by_kind_of_layer_are_those_of_the_whole_model():
    """Two kinds of layers that take turns, and one that absorbs nothing across blocks."""
    for family, config in (("gemma2", {"head_dim": 8, "sliding_window": 5}), ("llama", {}), ("olmo2", {})):
        sizes = tiny_checkpoints.SIZES | config | {"num_hidden_layers": 4}
        settings = tiny_checkpoints.AutoConfig.for_model(family, **sizes).to_dict()
        chain = decoder_blocks.Chain(models.config_from_hf(settings))
        graphdef, state = params.abstract(chain.config)
        whole = awq_jax.discover(
            lambda p, t, g=graphdef: nnx.merge(g, p)(t), state, jax.ShapeDtypeStruct((1, 8), np.int32)
        )
        assert chain.plan().to_dict() == whole.to_dict(), family


@pytest.mark.slow
def test_a_thousand_blocks_leak_nothing_and_compile_nothing(tmp_path):
    deep = tmp_path / "deep"
    tiny_checkpoints.checkpoint(deep, seed=3, **SIZES | {"num_hidden_layers": 1})
    weights = load_file(deep / "model.safetensors")
    layer = {k: v for k, v in weights.items() if ".layers.0." in k}
    many = {k.replace(".0.", f".{i}."): v for i in range(1000) for k, v in layer.items()}
    save_file({**weights, **many}, deep / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((deep / "config.json").read_text())
    (deep / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1000}))
    work = prepare(deep, tmp_path / "out", TOKENS, Options(batch_size=4), _settings())
    marks, compiled = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )

    class Bar:
        def update(self, n=1):
            status = Path("/proc/self/status").read_text()
            resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
            marks.append((len(compiled), resident))

    with manifest.opened(work.work, work.fingerprint()) as done:
        run._quantize(work, done, Bar())
    assert len({n for n, _ in marks[2:1002]}) == 1
    assert marks[1000][1] - marks[100][1] < 30 << 10, marks[::100]  # KiB


@pytest.mark.slow
def test_random_kills_end_in_identical_bytes(checkpoint, tmp_path):
    """SIGKILL at 25 random moments, of a process of its own each time."""
    np.save(tmp_path / "tokens.npy", TOKENS)
    options = ["--group-size", "16", "--method", "awq", "--no-clip", "--batch-size", "4", "--json", "--quiet"]
    argv = [
        sys.executable,
        "-m",
        "awq_jax.cli",
        "quantize",
        str(checkpoint),
        "--calib",
        str(tmp_path / "tokens.npy"),
    ]

    def start(name, hidden="memory"):
        return subprocess.Popen([*argv, str(tmp_path / name), *options, "--hidden", hidden], stdout=subprocess.DEVNULL)

    began = time.perf_counter()
    assert start("whole").wait() == 0
    length = time.perf_counter() - began
    rng = np.random.default_rng(0)
    for kill in range(25):
        process = start("out", ("memory", "disk")[kill % 2])
        try:
            assert process.wait(rng.uniform(0.3, 1.0) * length) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        else:
            assert files(tmp_path / "out") == files(tmp_path / "whole")
            shutil.rmtree(tmp_path / "out")
    assert start("out").wait() == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")
