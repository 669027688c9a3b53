"""Weights that were trained, not drawn: a small Gemma 3 and a small Qwen2, taught the words of this repository.

Random weights have no outliers, flat scores and no meaning; these have learned to predict text, so that a score says
something and quantization has something to lose.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import awq_jax

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
GEMMA |= {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {"qwen2": {}, "gemma3_text": GEMMA}
LENGTH, STEPS, BATCH = 64, 300, 16


def tokens() -> np.ndarray:
    """The repository's pages as one row of bytes."""
    pages = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    text = "\n".join(p.read_text() for p in pages if p.name != "models.md")
    return np.array(tiny_checkpoints.tokenizer()(text)["input_ids"], np.int32)


def log_probabilities(logits: Any) -> np.ndarray:
    """In float64."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def nll(logits: Any, rows: np.ndarray) -> float:
    """Mean negative log likelihood of each next token."""
    return -float(np.take_along_axis(log_probabilities(logits)[:, :-1], rows[:, 1:, None].astype(int), -1).mean())


def divergence(logits: Any, other: Any) -> float:
    """Mean Kullback-Leibler divergence of what ``other`` expects next."""
    p, q = log_probabilities(logits), log_probabilities(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_model_scores_here_as_in_transformers(family, tmp_path):
    """From safetensors, Qwen2 also from GGUF; and with 4 bits AWQ loses less than plain rounding, and little."""
    ids = tokens()
    train, held = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | FAMILIES[family]))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        starts = rng.integers(0, len(train) - LENGTH, BATCH)
        batch = torch.tensor(np.stack([train[s : s + LENGTH] for s in starts])).long()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (STEPS - step) / 100)
        optimizer.zero_grad()
        theirs(batch, labels=batch).loss.backward()
        optimizer.step()
    theirs.eval().save_pretrained(tmp_path / "float")
    tiny_checkpoints.tokenizer().save_pretrained(tmp_path / "float")

    rows = held[: len(held) // LENGTH * LENGTH].reshape(-1, LENGTH)[:32]
    with torch.no_grad():
        logits = theirs(torch.tensor(rows).long()).logits.numpy()
    want = nll(logits, rows)
    assert want < 0.6 * math.log(260)  # it has learned something
    model = awq_jax.load(tmp_path / "float")
    tiny_checkpoints.close(model(rows), logits)
    assert nll(model(rows), rows) == pytest.approx(want, rel=1e-4)
    if family == "qwen2":  # of Gemma, GGUF files are read, but not written
        model.save(tmp_path / "model.gguf", format="gguf-q8_0")
        assert nll(awq_jax.load(tmp_path / "model.gguf")(rows), rows) == pytest.approx(want, rel=1e-2)

    calib = train[: 32 * LENGTH].reshape(-1, LENGTH)
    lost = {}
    for method in ("rtn", "awq+gptq"):
        packed = awq_jax.load(tmp_path / "float")
        packed.quantize(calib, seq_len=LENGTH, samples=32, group_size=32, method=method, progress=False)
        packed.save(tmp_path / method)
        quantized = awq_jax.load(tmp_path / method, dtype="float32")(rows)
        lost[method] = divergence(logits, quantized)
        assert nll(quantized, rows) == pytest.approx(want, rel=0.05)
    assert lost["awq+gptq"] < lost["rtn"]
