"""Adapters with PEFT: what it saves is served here, and what is saved here it serves, with the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peers
import pytest
import tiny_checkpoints

import awq_jax
from awq_jax import lora
from awq_jax.adapters import files
from awq_jax.models.weights import modules

pytestmark = pytest.mark.slow
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12))


def test_both_ways(tmp_path: Path) -> None:
    base, theirs, ours = (tmp_path / name for name in ("base", "theirs", "ours"))
    tiny_checkpoints.checkpoint(base, "llama", seed=3, hidden_size=64, intermediate_size=96)
    np.save(tmp_path / "tokens.npy", TOKENS)
    peers.drive("peft", "peft_logits.py", "make", base, theirs, tmp_path / "tokens.npy", tmp_path / "made.npy")
    want = np.load(tmp_path / "made.npy")
    model = awq_jax.load(base)
    got = awq_jax.load(base, adapter=theirs)(TOKENS)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert np.abs(np.asarray(model(TOKENS)) - want).max() > 0.05 * np.abs(want).max()
    read = lora.load(theirs)
    every = [linear.module for linear in modules.linears(model.config)]
    lora.save(files.Adapter(read.factors, files.config_of(read.factors, every, str(base), rslora=True)), ours)
    peers.drive("peft", "peft_logits.py", "load", base, ours, tmp_path / "tokens.npy", tmp_path / "read.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "read.npy"), want)
