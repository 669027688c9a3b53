"""Quantizing on the quantized stream: against the finished model run as a whole, in memory and from disk."""

from pathlib import Path

import family_cases
import jax
import numpy as np
import pytest
import tiny_checkpoints
from tiny_checkpoints import randomized

import awq_jax
from awq_jax import paths
from awq_jax.qtensor import QuantizedTensor
from awq_jax.quantizer.following import Aim
from awq_jax.quantizer.scale_groups import GroupScale
from awq_jax.stream import folds, lockstep, parts

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
        model.quantize(TOKENS, **FAST, **options)
    return model, seen


@pytest.fixture(scope="module")
def whole(checkpoint):
    model, seen = finished(checkpoint)
    model.save(checkpoint.parent / "whole")
    return model, seen


def files(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir()}


def rounded_for_what_it_reads(checkpoint, model, seen) -> None:
    """`awq_jax.calibrate` on the finished model's dequantized weights, which knows neither blocks nor streams."""
    params = paths.map_with_path(lambda _, w: w.dequantize() if isinstance(w, QuantizedTensor) else w, model.params)
    batches = list(TOKENS.reshape(3, 2, 16))
    served = awq_jax.calibrate(model.apply, params, batches, progress=False)
    floats = awq_jax.load(checkpoint)
    before = awq_jax.calibrate(floats.apply, floats.params, batches, progress=False)
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
    rounded_for_what_it_reads(checkpoint, *whole)


@pytest.mark.parametrize("family", ["qwen3_moe", *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)])
def test_so_it_is_in_every_family(family, tmp_path):
    case = next(c for c in family_cases.CASES if c.name == family)
    directory = tmp_path / "float"
    randomized(case.family, family_cases.config_of(case)).save_pretrained(directory)
    model, seen = finished(directory, on_indivisible="pad")
    rounded_for_what_it_reads(directory, model, seen)


def test_what_it_ends_with_is_nearer_to_the_float_model(checkpoint, whole):
    model, seen = whole
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


def test_folds_are_whole_batches_one_after_another():
    assert folds.of_batches([16] * 8) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert folds.of_batches([16]) == [2]
    assert folds.of_batches([8, 8]) == [1, 3]
    rows = np.arange(12).reshape(6, 2)
    split = folds.apart([rows])
    assert [len(b) for b in split] == [2, 2, 1, 1]
    np.testing.assert_array_equal(np.concatenate(split), rows)
    assert len(folds.apart([rows[:1]])) == 1


def test_rounding_to_nearest_has_one_stream(checkpoint):
    model = awq_jax.load(checkpoint)
    report = model.quantize(TOKENS, **FAST | {"method": "rtn"})
    assert report.tokens == TOKENS.size
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(model(TOKENS))))
