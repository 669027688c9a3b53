"""Experts whose Grams do not fit into memory at once."""

from __future__ import annotations

import families
import numpy as np
import pytest
from tiny import randomized

import awq_jax
from awq_jax import blockwise, expert_grams
from awq_jax.plan import Group
from awq_jax.report import Report

TOKENS = np.random.default_rng(0).integers(3, 64, (8, 16)).astype(np.int32)
FAST = {"group_size": 16, "method": "awq", "clip": False, "n_grid": 2, "progress": False, "batch_size": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("experts") / "float"
    case = next(c for c in families.CASES if c.name == "qwen3_moe")
    randomized(case.family, families.config_of(case)).save_pretrained(directory)
    return directory


def quantize(source, target) -> tuple[dict[str, bytes], Report]:
    done = awq_jax.quantize_checkpoint(source, target, TOKENS, **FAST)
    return {f.name: f.read_bytes() for f in target.iterdir()}, done.report


@pytest.fixture(scope="module")
def whole(checkpoint):
    return quantize(checkpoint, checkpoint.parent / "whole")


def test_experts_some_at_a_time_end_with_the_same_bytes(checkpoint, whole, tmp_path, monkeypatch):
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

    monkeypatch.setattr(blockwise, "ExpertGrams", Watched)
    files, report = quantize(checkpoint, tmp_path / "out")
    assert held
    assert {n for _, n in held} == {limit}
    assert {start for start, _ in held} == {0, 2}
    assert report.layers == whole[1].layers
    assert files == whole[0]


def test_experts_seen_too_rarely_are_listed(whole):
    rows = [row for row in whole[1].layers if "experts/down_proj" in row.path]
    assert any("saw under 64 tokens: the layer's statistics were used" in row.reason for row in rows)


@pytest.mark.parametrize(("experts", "size"), [(8, 2), (6, 3), (7, 1), (2, None)])
def test_as_many_at_a_time_as_fit_and_divide(experts, size, monkeypatch):
    monkeypatch.setattr(expert_grams, "BUDGET", 3 * 4 * 10**2)
    assert expert_grams.at_a_time(Group("g", (), 10, batch=(experts,))) == size
