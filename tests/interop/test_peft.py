"""Adapters with PEFT: what it saves is served here, and what is saved here it serves, with the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peers
import pytest
import tiny_checkpoints

import awq_jax
from awq_jax import convert, lora
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


def test_over_awq_weights(tmp_path: Path) -> None:
    """A float model's adapter on AutoAWQ's layout: the loss that PEFT has with the rescaled one over its weights.

    PEFT multiplies packed weights with GPTQModel's kernels; plain dequantization stands in for them.
    """
    base, theirs, packed, dense = (tmp_path / name for name in ("base", "theirs", "packed", "dense"))
    tiny_checkpoints.checkpoint(base, "llama", seed=3, hidden_size=64, intermediate_size=96)
    tokens = np.random.default_rng(1).integers(0, 256, (8, 48))
    np.save(tmp_path / "tokens.npy", tokens)
    peers.drive("peft", "peft_logits.py", "make", base, theirs, tmp_path / "tokens.npy", tmp_path / "made.npy")
    calib = np.random.default_rng(2).integers(0, 256, (8, 32)).astype(np.int32)
    awq_jax.quantize_checkpoint(base, packed, calib, group_size=32, method="awq", samples=8, seq_len=32, progress=False)
    assert convert.open_source(packed).format == "gemm"
    lora.save(lora.load(theirs, base=packed), tmp_path / "rescaled")
    convert.checkpoint(packed, dense, "float", allow_lossy=True)
    out = tmp_path / "read.npy"
    peers.drive("peft", "peft_logits.py", "load", dense, tmp_path / "rescaled", tmp_path / "tokens.npy", out)
    served = awq_jax.load(packed, "float32", adapter=theirs)
    got, want = (nll(logits, tokens) for logits in (served(tokens), np.load(out)))
    assert abs(got - want) < 1e-3 < abs(nll(awq_jax.load(packed, "float32")(tokens), tokens) - want)


def nll(logits: object, tokens: np.ndarray) -> float:
    """Mean negative log likelihood of each token after the first, in nats."""
    x = np.asarray(logits, np.float64)[:, :-1]
    x = x - x.max(-1, keepdims=True)
    x = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return -float(np.take_along_axis(x, tokens[:, 1:, None], -1).mean())
