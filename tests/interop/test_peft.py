"""Adapters with PEFT: what it saves is served here, and what is saved here it serves, with the same logits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import peers
import pytest
import tiny_checkpoints
from vllm_families import log_softmax

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


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A float model's adapter on the AutoAWQ checkpoint of that model.

    Attributes:
      packed, adapter, tokens: the checkpoint, the adapter rescaled for it, and an array ``[rows, T]`` of text.
      ours: log-probabilities ``[rows, T, V]`` here.
      without: mean negative log likelihood of the text without the adapter.
    """

    packed: Path
    adapter: Path
    tokens: Path
    ours: np.ndarray
    without: float


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """Of a model that has learned a text, packed in groups of 32."""
    peers.environment("peft")
    work = tmp_path_factory.mktemp("adapted")
    base, theirs, packed, adapter = (work / name for name in ("base", "theirs", "packed", "adapter"))
    peers.float_checkpoint(base, "llama")
    tokens = np.stack([peers.prompt(start, 40) for start in range(0, 320, 20)])
    np.save(work / "tokens.npy", tokens)
    peers.drive("peft", "peft_logits.py", "make", base, theirs, work / "tokens.npy", work / "made.npy")
    calib = np.stack([peers.prompt(start, 64) for start in range(0, 320, 20)]).astype(np.int32)
    awq_jax.quantize_checkpoint(base, packed, calib, group_size=32, method="awq", samples=8, seq_len=64, progress=False)
    assert convert.open_source(packed).format == "gemm"
    lora.save(lora.load(theirs, base=packed), adapter)
    ours = log_softmax(np.asarray(awq_jax.load(packed, "float32", adapter=theirs)(tokens)))
    without = log_softmax(np.asarray(awq_jax.load(packed, "float32")(tokens)))
    return Adapted(packed, adapter, work / "tokens.npy", ours, nll(without, tokens))


def test_peft_over_awq_weights(adapted: Adapted, tmp_path: Path) -> None:
    """Multiplied by GPTQModel's kernels, which round each dequantized weight to float16."""
    peers.drive(
        "gptqmodel", "peft_logits.py", "load", adapted.packed, adapted.adapter, adapted.tokens, tmp_path / "read.npy"
    )
    tokens = np.load(adapted.tokens)
    got, want = nll(adapted.ours, tokens), nll(log_softmax(np.load(tmp_path / "read.npy")), tokens)
    print("PEFT over AutoAWQ's layout: NLL", want, "here", got, "without the adapter", adapted.without)
    assert abs(got - want) < 1e-3 < 0.1 * abs(adapted.without - want)


def test_vllm_over_awq_weights(adapted: Adapted, tmp_path: Path) -> None:
    """In float16, by its own kernels where the processor has what they need."""
    kernels = "engine" if peers.has_amx() else "plain"
    arguments = (kernels, adapted.packed, adapted.adapter, adapted.tokens, tmp_path / "read.npy")
    peers.drive("vllm", "lora_vllm.py", *arguments)
    tokens = np.load(adapted.tokens)
    assert tokens.size >= 500
    theirs = np.load(tmp_path / "read.npy")[..., : adapted.ours.shape[-1]].astype(np.float64)
    differences = np.abs(theirs - adapted.ours)
    got, want = nll(adapted.ours, tokens), nll(theirs, tokens)
    print("vLLM with", kernels, "kernels, prefixes:", tokens.size, "NLL", want, "here", got)
    print("log-probabilities: mean difference", differences.mean(), "largest", differences.max())
    assert abs(got - want) < 2e-3 < 0.1 * abs(adapted.without - want)
    assert differences.mean() < 2e-3


def nll(log_probabilities: np.ndarray, tokens: np.ndarray) -> float:
    """Mean negative log likelihood of each token after the first, in nats."""
    return -float(np.take_along_axis(log_probabilities[:, :-1], tokens[:, 1:, None], -1).mean())
