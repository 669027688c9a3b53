"""Experts whose Grams do not fit into memory at once."""

from __future__ import annotations

import gc
import weakref

import family_cases
import numpy as np
import pytest
from tiny_checkpoints import randomized

import awq_jax
from awq_jax import paths
from awq_jax.calibration import expert_grams
from awq_jax.calibration.calibration import Stats
from awq_jax.calibration.means import means_of
from awq_jax.config import AwqConfig
from awq_jax.plan.plan import ScaleGroup
from awq_jax.report import Report
from awq_jax.stream import one_pass, parts
from awq_jax.stream import session as stream_session
from awq_jax.stream.hidden_states import InMemory

TOKENS = np.random.default_rng(0).integers(3, 64, (9, 16)).astype(np.int32)  # the last is kept out
FAST = {"group_size": 16, "method": "awq", "clip": False, "n_grid": 2, "progress": False, "batch_size": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("experts") / "float"
    case = next(c for c in family_cases.CASES if c.name == "qwen3_moe")
    randomized(case.family, family_cases.config_of(case)).save_pretrained(directory)
    return directory


def quantize(source, target, **options) -> tuple[dict[str, bytes], Report]:
    done = awq_jax.quantize_checkpoint(source, target, TOKENS, **FAST, **options)
    return {f.name: f.read_bytes() for f in target.iterdir()}, done.report


@pytest.fixture(scope="module")
def whole(checkpoint):
    return quantize(checkpoint, checkpoint.parent / "whole")


def test_experts_some_at_a_time_end_alike(checkpoint, whole, tmp_path, monkeypatch):
    """Each Gram is collected when it is asked for, and no more than allowed are there at a time."""
    limit = 2 * 4 * 32**2
    monkeypatch.setattr(expert_grams, "BUDGET", limit)
    held = []

    class Watched(expert_grams.ExpertGrams):
        def __init__(self, layer, size, collect):
            def watch(start):
                grams = collect(start)
                held.append((start, grams.nbytes))
                return grams

            super().__init__(layer, size, watch)

    monkeypatch.setattr(one_pass, "ExpertGrams", Watched)
    files, report = quantize(checkpoint, tmp_path / "out")
    assert held
    assert {n for _, n in held} == {limit}
    assert {start for start, _ in held} == {0, 2}
    assert files.keys() == whole[0].keys()
    for row, want in zip(report.layers, whole[1].layers, strict=True):
        assert (row.path, row.ratio, row.scale, row.reason) == (want.path, want.ratio, want.scale, want.reason)
        assert row.error == pytest.approx(want.error, rel=1e-3)  # sums of other shapes round otherwise


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["memory", "disk"])
def test_a_run_that_breaks_off_among_such_blocks_continues_with_the_same_bytes(
    checkpoint, tmp_path, monkeypatch, hidden
):
    """What comes out of the finished blocks is made by the program that made it before."""
    monkeypatch.setattr(expert_grams, "BUDGET", 2 * 4 * 32**2)
    want, _ = quantize(checkpoint, tmp_path / "want")
    write, written = parts.write_file, iter(range(100))

    def stopped(*args):
        if next(written) == 2:
            raise KeyboardInterrupt
        return write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "write_file", stopped)
        with pytest.raises(KeyboardInterrupt):
            quantize(checkpoint, tmp_path / "out", hidden=hidden)
    got, _ = quantize(checkpoint, tmp_path / "out", hidden=hidden, resume=True)
    assert got == want


def test_grams_of_some_experts_are_those_of_all(checkpoint, monkeypatch):
    model = awq_jax.load(checkpoint)
    leaves = paths.flatten(model.params)
    found = []
    for budget in (expert_grams.BUDGET, 4 * 32**2):
        monkeypatch.setattr(expert_grams, "BUDGET", budget)
        session = stream_session.Session(model.config, AwqConfig(group_size=16, method="awq"))
        hidden = InMemory([TOKENS[:4], TOKENS[4:]])
        for block in session.blocks[:3]:
            mine = {p: leaves[block.prefix + p] for p in block.leaves}
            fetch = session.calibrate(block, mine, hidden).fitted
            down = next((g for g, _ in session.work(block) if g.name == "layers/1/mlp/experts/down_proj/kernel"), None)
            if down is not None:
                stats = fetch(down.name)
                grams = [stats.grams(down).collect(e) for e in range(4)]
                found.append((np.stack(grams), stats.count))
            if budget < 2**20 and session.experts_at_a_time(block):
                session.pass_on(block, mine, hidden)
    (all_grams, all_counts), (some, counts) = found
    np.testing.assert_array_equal(counts, all_counts)
    np.testing.assert_allclose(some, all_grams, rtol=1e-5, atol=1e-5 * np.abs(all_grams).max())
    assert (all_counts > 0).all()


def test_experts_seen_too_rarely_are_listed(whole):
    rows = [row for row in whole[1].layers if "experts/down_proj" in row.path]
    assert any("saw under 64 tokens: the layer's statistics were used" in row.reason for row in rows)


def test_statistics_of_a_layer_are_let_go_with_those_of_its_experts():
    """They hold on to a block's Grams, or to the block itself where its Grams are collected some at a time."""
    gram = np.random.default_rng(1).normal(size=(3, 4, 4)).astype(np.float32)
    few = Stats(gram, np.ones((3, 4), np.float32), np.array([100, 200, 1], np.float32), np.zeros(3, np.float32))
    found = means_of(ScaleGroup("g", (), 4, batch=(3,)), few)
    total, count = found.collect_gram(0, 2)
    np.testing.assert_allclose(total, gram.sum(axis=0), rtol=1e-5)
    assert count == 301
    assert found.collect_gram(0, 2)[0] is total  # added up once
    left = weakref.ref(found)
    del found
    gc.collect()
    assert left() is None


@pytest.mark.parametrize(("experts", "size"), [(8, 2), (6, 3), (7, 1), (2, None)])
def test_as_many_at_a_time_as_fit_and_divide(experts, size, monkeypatch):
    monkeypatch.setattr(expert_grams, "BUDGET", 3 * 4 * 10**2)
    assert expert_grams.at_a_time(ScaleGroup("g", (), 10, batch=(experts,))) == size
