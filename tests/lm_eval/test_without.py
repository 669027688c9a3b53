"""What of the lm-eval model needs no lm-eval: what tasks say of generation, scoring, and the message without it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from awq_jax.errors import ConfigError, ShapeError
from awq_jax.lm_eval import command, scoring
from awq_jax.lm_eval.settings import generation


def test_without_lm_eval_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = importlib.machinery.ModuleSpec("lm_eval", None)
    for found in (None, folder):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _, found=found: found)
        assert command.main() == 2
        assert "pip install lm-eval" in capsys.readouterr().err


def test_what_tasks_say_of_generation() -> None:
    assert generation({}, 256) == (256, (), {"temperature": 0.0})
    given = {"until": "\n", "max_new_tokens": 5, "do_sample": False, "temperature": 0.7, "num_beams": 1}
    assert generation(given, 256) == (5, ("\n",), {"temperature": 0.0})
    given = {
        "until": ["a", ""],
        "max_gen_toks": 7,
        "max_tokens": 5,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
    }
    assert generation(given, 256) == (7, ("a",), {"temperature": 0.7, "top_p": 0.9})
    for bad in ({"num_beams": 4}, {"max_length": 9}, {"colour": 1}):
        with pytest.raises(ConfigError, match=f"generation_kwargs has {next(iter(bad))}"):
            generation(bad, 256)


def test_scores_are_those_of_the_whole_logits(tmp_path: Path) -> None:
    """Against the model's logits of each row alone, in float64; few programs, whatever the rows are."""
    tiny = pytest.importorskip("tiny_checkpoints", reason="makes checkpoints with torch", exc_type=ImportError)
    import awq_jax

    tiny.checkpoint(tmp_path, num_hidden_layers=1)
    model = awq_jax.load(tmp_path)
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 288, a).tolist(), rng.integers(0, 288, b).tolist()) for a, b in
            ((1, 1), (3, 2), (9, 7), (5, 1), (12, 3), (1, 60), (60, 3), (70, 4), (30, 70))]  # fmt: skip
    top = int(np.argmax(model([[*rows[0][0], *[0] * 63]])[0, 0]))
    rows.append((rows[0][0], [top]))
    told: dict[int, scoring.Scored] = {}
    scorer = scoring.Scorer(*model._weights.serving(), batch_size=4)
    with jax.default_matmul_precision("highest"):
        found = scorer(rows, told.__setitem__)
    assert [told[i] for i in range(len(rows))] == found
    assert scorer.score._cache_size() <= 4
    for (context, continuation), got in zip(rows, found, strict=True):
        whole = [*context, *continuation][-65:]
        logits = np.asarray(model([[*whole[:-1], *[0] * (65 - len(whole))]])[0], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        at = range(max(len(whole) - 1 - len(continuation), 0), len(whole) - 1)
        want = sum(logprobs[i, whole[i + 1]] for i in at)
        assert got.loglikelihood == pytest.approx(want, abs=1e-4)
        assert got.greedy == all(logits[i].argmax() == whole[i + 1] for i in at)
    assert [s.greedy for s in found].count(True) == 1
    with pytest.raises(ShapeError, match="outside the vocabulary"):
        scorer([([1], [288])])
    assert max(len(b) for b in scoring.Scorer(*model._weights.serving(), most=3).batches(rows)) <= 3
