"""Quantizing on the quantized stream: against the finished model run as a whole, in memory and from disk."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import family_cases
import jax
import numpy as np
import pytest
import tiny_checkpoints
from tiny_checkpoints import randomized

import awq_jax
from awq_jax import paths
from awq_jax.algorithm.grid import quantize_dequantize
from awq_jax.config import AwqConfig
from awq_jax.qtensor import QuantizedTensor
from awq_jax.quantizer import advice
from awq_jax.quantizer.following import Aim
from awq_jax.quantizer.scale_groups import GroupScale
from awq_jax.report import LayerReport, Report
from awq_jax.stream import folds, lockstep, parts
from awq_jax.trace import interpret

TOKENS = np.random.default_rng(1).integers(3, 64, (6, 16)).astype(np.int32)
FAST = {"group_size": 16, "bits": 2, "clip": False, "n_grid": 2, "progress": False, "batch_size": 2, "sequential": True}
OTHERS = ("gemma2", "phi", "gpt_neox", "falcon")
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 4, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sequential") / "float"
    tiny_checkpoints.checkpoint(directory, seed=3, **SIZES)
    return directory


def finished(checkpoint, **options):
    """A model quantized in memory, and what each group was rounded for, with its scale."""
    seen: dict[str, tuple[Aim, GroupScale]] = {}
    real = lockstep.Lockstep.reach

    def reach(self, group, targets, found):
        seen[group.name] = (real(self, group, targets, found), found)
        return seen[group.name][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lockstep.Lockstep, "reach", reach)
        model = awq_jax.load(checkpoint)
        report = model.quantize(TOKENS, **FAST, **options)
    return model, seen, report


@pytest.fixture(scope="module")
def whole(checkpoint):
    made = finished(checkpoint)
    made[0].save(checkpoint.parent / "whole")
    return made


def files(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir()}


def rounded_for_what_it_reads(checkpoint, model, seen) -> None:
    """`awq_jax.calibrate` on the finished model's dequantized weights, which knows neither blocks nor streams."""
    params = paths.map_with_path(lambda _, w: w.dequantize() if isinstance(w, QuantizedTensor) else w, model.params)
    served = awq_jax.calibrate(model.apply, params, [TOKENS[:5]], progress=False)
    floats = awq_jax.load(checkpoint)
    before = awq_jax.calibrate(floats.apply, floats.params, [TOKENS[:5]], progress=False)
    moved = 0
    for name, (aim, found) in seen.items():
        group = next(g for g in served.plan.groups if g.name == name)
        scale = np.ones((*group.batch, group.channels), np.float32)
        scale = found.scale if found.scale is not None and group.absorbers else scale
        want = np.asarray(served.stats[name].gram) * scale[..., :, None] * scale[..., None, :]
        np.testing.assert_allclose(aim.stats.gram, want, rtol=1e-3, atol=2e-4 * np.abs(want).max())
        np.testing.assert_array_equal(aim.stats.count, served.stats[name].count)
        moved += not np.allclose(want, before.stats[name].gram, rtol=1e-2)
    assert moved > len(seen) / 2  # two bits change all inputs but the first ones


def test_each_group_is_rounded_for_what_it_reads_in_the_finished_model(checkpoint, whole):
    assert len(whole[1]) == 8
    rounded_for_what_it_reads(checkpoint, *whole[:2])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", *OTHERS])
def test_so_it_is_in_every_family(family, tmp_path):
    case = next(c for c in family_cases.CASES if c.name == family)
    directory = tmp_path / "float"
    randomized(case.family, family_cases.config_of(case)).save_pretrained(directory)
    model, seen, _ = finished(directory, on_indivisible="pad")
    rounded_for_what_it_reads(directory, model, seen)


def test_what_it_ends_with_is_nearer_to_the_float_model(checkpoint, whole):
    model, seen, _ = whole
    floats = awq_jax.load(checkpoint)
    once = awq_jax.load(checkpoint)
    once.quantize(TOKENS, **FAST | {"sequential": False})
    want = np.asarray(floats(TOKENS))
    lost = [np.square(np.asarray(m(TOKENS)) - want).mean() for m in (model, once)]
    assert lost[0] < 0.9 * lost[1]
    assert any(aim.weights for aim, _ in seen.values())


@pytest.mark.parametrize("hidden", ["memory", "disk"])
def test_the_bytes_of_a_run_that_was_stopped_are_those_of_the_model_in_memory(
    checkpoint, whole, tmp_path, monkeypatch, hidden
):
    class Stopped(BaseException):
        pass

    real = parts.write_tensors

    def write(work, number, tensors):
        if number == 2:
            raise Stopped
        return real(work, number, tensors)

    asked = {"calib": TOKENS, "hidden": hidden, **FAST}
    monkeypatch.setattr(parts, "write_tensors", write)
    with pytest.raises(Stopped):
        awq_jax.quantize_checkpoint(checkpoint, tmp_path / "out", **asked)
    monkeypatch.setattr(parts, "write_tensors", real)
    done = awq_jax.quantize_checkpoint(checkpoint, tmp_path / "out", **asked)
    assert done.resumed == 2
    assert files(tmp_path / "out") == files(checkpoint.parent / "whole")


def inputs(apply, params, tokens) -> dict[str, np.ndarray]:
    """What every weight reads, ``[T, K]``, by path."""
    program = interpret.trace(apply, params, tokens)
    _, tapped = interpret.run(program, params, tokens, tap=lambda use, x: x)
    return {use.path: np.asarray(tapped[use.index], np.float64) for use in program.uses if use.index in tapped}


def test_errors_told_are_those_on_the_sequences_kept_out(checkpoint, whole):
    """Against NumPy, on the last of six sequences, of which a weight's results are not added to anything."""
    model, seen, report = whole
    floats = awq_jax.load(checkpoint)
    params = paths.map_with_path(lambda _, w: w.dequantize() if isinstance(w, QuantizedTensor) else w, model.params)
    a, b = inputs(model.apply, params, TOKENS[5:]), inputs(floats.apply, floats.params, TOKENS[5:])
    rows = {row.path: row for row in report.layers}
    name = "layers/1/mlp/gate_proj/kernel"
    found = seen[name][1].scale
    scale = np.ones(32) if found is None else found.astype(np.float64)
    w, stored = (np.asarray(paths.flatten(p)[name], np.float64) for p in (floats.params, params))
    aim, own = b[name] @ w, np.square(a[name] * scale @ w).sum()
    assert rows[name].kept_out == pytest.approx(np.square(a[name] @ stored - aim).sum() / own, rel=2e-3)
    plain = np.asarray(quantize_dequantize(w.astype(np.float32), 16, 2, False, "float32"), np.float64)
    lost = np.square((a[name] * scale) @ plain - aim).sum() / own
    assert rows[name].kept_out_rtn == pytest.approx(lost, rel=2e-3)
    assert "kept out" in str(report)


def test_a_group_that_is_worse_on_them_is_rounded_instead(checkpoint, monkeypatch):
    """With correlations of three tokens taken for true."""
    model = awq_jax.load(checkpoint)
    report = model.quantize(TOKENS[:1, :5], **FAST, shrinkage=0.0, damping=1e-6)
    rounded = [row for row in report.layers if "worse than plain rounding on 2 tokens kept out" in row.reason]
    assert rounded
    for row in report.layers:
        assert row.kept_out is not None
        if row.scale == "none":
            assert row.kept_out <= row.kept_out_rtn * 1.5 or row not in rounded


def test_tokens_that_are_too_few_are_a_warning_that_says_how_many_would_do(caplog):
    def row(path, **known):
        return LayerReport(path, path, (8, 8), 4, 8, False, 256, 40, 0.2, 0.1, **known)

    def report(*rows):
        return Report(AwqConfig().to_dict(), list(rows), {}, 1000, {}, 1, 1)

    few, fine = row("a/kernel", shrinkage=0.8), row("b/kernel", shrinkage=0.3, kept_out=0.1, kept_out_rtn=0.2)
    (said,) = advice.warn(report(few, fine))
    assert "1,000 calibration tokens are few for the inputs of 1 of 2 weights, such as a/kernel" in said
    assert said in caplog.text
    # By hand: of a share of .8, .2/.9 is kept, so chance is (1 - 2/9) / (1 + 2 * 2/9); .3 likewise.
    wanted = 1000 * (7 / 13) / ((1 - 7 / 9) / (1 + 2 * 7 / 9))
    assert float(said.split("about ")[1].split(" ")[0].replace(",", "")) == pytest.approx(wanted, rel=0.1)
    assert advice.warn(report(fine)) == []
    (said,) = advice.warn(report(fine, row("c/kernel", kept_out=0.3, kept_out_rtn=0.2)))
    assert "such as c/kernel: calibrate on more text" in said


def test_folds_are_whole_batches_one_after_another_and_the_last_are_kept_out():
    assert folds.of_batches([1] * 9) == [0, 0, 1, 1, 2, 2, 3, 3, -1]
    assert folds.of_batches([1] * 3) == [0, 2, -1]
    assert folds.of_batches([1]) == [0]
    assert folds.of_batches([1, 1]) == [0, -1]
    rows = np.arange(32).reshape(16, 2)
    split = folds.apart([rows[:9], rows[9:]])
    np.testing.assert_array_equal(np.concatenate(split), rows)
    of = folds.of_batches([len(b) for b in split])
    assert [len(b) for b, fold in zip(split, of, strict=True) if fold == folds.KEPT_OUT] == [2]
    assert set(of) == {0, 1, 2, 3, -1}
    assert max(map(len, split)) <= 9
    assert len(folds.apart([rows[:1]])) == 1
    assert [len(b) for b in folds.apart([rows[:3], rows[:1, :1]])] == [3, 1]  # lengths differ


def test_rounding_to_nearest_has_one_stream(checkpoint):
    model = awq_jax.load(checkpoint)
    report = model.quantize(TOKENS, **FAST | {"method": "rtn"})
    assert report.tokens == TOKENS.size
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(model(TOKENS))))


DRIVER = """
import sys, numpy as np, jax, awq_jax
from jax.sharding import Mesh
source, tokens, out = sys.argv[1:]
how = dict(group_size=16, bits=2, clip=False, n_grid=2, progress=False, batch_size=2, sequential=True)
mesh = Mesh(np.asarray(jax.devices()), ("devices",))
awq_jax.quantize_checkpoint(source, out, np.load(tokens), mesh=mesh, **how)
"""


@pytest.mark.slow
def test_two_devices_make_the_bits_of_one(checkpoint, whole, tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS)
    argv = [sys.executable, "-c", DRIVER, str(checkpoint), str(tmp_path / "tokens.npy"), str(tmp_path / "out")]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    subprocess.run(argv, env={**os.environ, **flags}, check=True)
    assert files(tmp_path / "out") == files(checkpoint.parent / "whole")


@pytest.mark.slow
def test_two_processes_make_the_bits_of_one(checkpoint, whole, tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    argv = [sys.executable, "-m", "awq_jax", "quantize", str(checkpoint), str(tmp_path / "out"), "--no-clip"]
    argv += ["--calib", str(tmp_path / "tokens.npy"), "--group-size", "16", "--bits", "2", "--batch-size", "2"]
    argv += ["--sequential", "--quiet", "--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id"]
    running = [subprocess.Popen([*argv, str(i)], env={**os.environ, "JAX_PLATFORMS": "cpu"}) for i in range(2)]
    assert [p.wait() for p in running] == [0, 0]
    alone = argv[: argv.index("--coordinator")]
    alone[alone.index(str(tmp_path / "out"))] = str(tmp_path / "alone")
    subprocess.run(alone, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
    assert files(tmp_path / "out") == files(tmp_path / "alone")
