"""Sequences begin as the model's input does: with BOS, where its tokenizer puts one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bpe_tokenizers import byte_level

from awq_jax import data, evaluate
from awq_jax.convert import text
from awq_jax.data import tokens
from awq_jax.errors import CalibrationError, ConfigError

BOS = "<|endoftext|>"
BOOK = "".join(f"the cat {i % 7} sat on mat {i * i % 11} and the dog ran. " for i in range(400))


def tokenizer(bos=BOS, named=BOS):
    backend = byte_level("smollm")
    text.surround(backend, bos, None)
    return text.Tokenizer(backend, {"bos_token": named} if named else {})


@dataclasses.dataclass
class Trained:
    params: Any
    apply: Any
    tokenizer: Any


def causal(params, ids):
    """Logits from a token and the mean of all before it: BOS is a part of every mean that the model has learned on."""
    x = params["embed"][ids]
    mean = jnp.cumsum(x, axis=1) / jnp.arange(1, ids.shape[1] + 1)[:, None]
    return (x + jnp.tanh(mean @ params["mix"])) @ params["head"]


@pytest.fixture(scope="module")
def trained():
    """A model that has learned the book, from rows that begin with BOS."""
    t = tokenizer()
    rows = data.load([BOOK], t, samples=64, seq_len=16).tokens
    rng = np.random.default_rng(0)
    shapes = {"embed": (len(t), 16), "mix": (16, 16), "head": (16, len(t))}
    params = {name: jnp.asarray(rng.normal(size=s) * 0.5, jnp.float32) for name, s in shapes.items()}

    def loss(params, ids):
        scores = jax.nn.log_softmax(causal(params, ids)[:, :-1])
        return -jnp.take_along_axis(scores, ids[:, 1:, None], -1).mean()

    @jax.jit
    def step(params, mean):
        mean = jax.tree.map(lambda m, g: 0.9 * m + g, mean, jax.grad(loss)(params, rows))
        return jax.tree.map(lambda p, m: p - 0.3 * m, params, mean), mean

    mean = jax.tree.map(jnp.zeros_like, params)
    for _ in range(200):
        params, mean = step(params, mean)
    return Trained(params, causal, t)


def by_hand(model, rows, skip=0):
    """Mean NLL of what follows the first token of each row (and ``skip`` more), in float64."""
    logits = np.asarray(model.apply(model.params, jnp.asarray(rows)), np.float64)[:, :-1]
    top = logits.max(-1, keepdims=True)
    scores = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -np.take_along_axis(scores, np.asarray(rows)[:, 1:, None], -1)[:, skip:].mean()


def test_a_model_that_knows_bos_is_scored_with_it_in_every_window(trained):
    ids = trained.tokenizer.encode(BOOK, add_special_tokens=False)
    ids, after = ids[: 20 * 15], ids[20 * 15 : 20 * 15 + 1]
    rows = np.concatenate([np.full((20, 1), trained.tokenizer.bos_token_id), np.reshape(ids, (20, 15))], 1)
    settings = {"context": 16, "max_tokens": 300}
    got = evaluate.perplexity(trained, BOOK, **settings)
    assert got.nll == pytest.approx(by_hand(trained, rows), rel=1e-5)
    assert (got.tokens, len(got.window_nll)) == (300, 20)
    # The same text as tokens, with a BOS of its own or without, and windows that are not of one length.
    for given in (ids, [trained.tokenizer.bos_token_id, *ids]):
        assert evaluate.perplexity(trained, np.asarray(given), **settings).nll == got.nll
    # The model wants it: the same tokens are worse without, and so they are in windows that begin as they may.
    assert by_hand(trained, rows[:, 1:]) > by_hand(trained, rows, skip=1) + 0.05
    without = evaluate.perplexity(trained, BOOK, context=15, max_tokens=300, bos="no")
    overlapping = np.lib.stride_tricks.sliding_window_view(ids + after, 16)[::15]
    assert without.nll == pytest.approx(by_hand(trained, overlapping), rel=1e-5)
    assert evaluate.kl(trained, trained, BOOK, **settings).tokens == 300


@pytest.mark.parametrize(("context", "stride"), [(16, None), (16, 5), (16, 1), (400, None)])
def test_every_token_is_scored_once_after_bos(trained, context, stride):
    t = trained.tokenizer
    ids = np.asarray(t.encode(BOOK, add_special_tokens=False)[:61])
    got = evaluate.perplexity(trained, ids, context=context, stride=stride, batch_size=3)
    span = min(context - 1, len(ids))
    total, done, start = 0.0, 0, 0
    while done < len(ids):
        row = np.concatenate([[t.bos_token_id], ids[start : start + span]])[None]
        fresh = min(start + span, len(ids)) - done
        logits = np.asarray(trained.apply(trained.params, jnp.asarray(row)), np.float64)[0, :-1]
        scores = np.asarray(jax.nn.log_softmax(logits))
        total -= scores[np.arange(len(scores)), row[0, 1:]][-fresh:].sum()
        done, start = done + fresh, start + min(stride or span, span)
    assert got.tokens == len(ids)
    assert got.nll == pytest.approx(total / len(ids), rel=1e-5)


def test_what_sequences_begin_with():
    adds, knows, none = tokenizer(), tokenizer(None), tokenizer(None, None)
    start = adds.bos_token_id
    assert tokens.beginning(adds) == tokens.Beginning((start,), (start,), BOS)
    assert tokens.beginning(adds, "no").ids == ()
    assert tokens.beginning(knows).ids == ()
    assert tokens.beginning(knows, "yes") == tokens.Beginning((start,), (), BOS)
    for wrong, setting in ((none, "yes"), (None, "yes"), (adds, "maybe")):
        with pytest.raises(ConfigError, match=r"use bos=|bos must be"):
            tokens.beginning(wrong, setting)

    class Glm:  # [gMASK] <sop>
        def __call__(self, texts, **_):
            return {"input_ids": [[7, 8, *t.encode(), 9] for t in texts]}

    assert tokens.beginning(Glm()).ids == (7, 8)
    assert data.load(["abc"], Glm(), samples=1, seq_len=5).tokens.tolist() == [[7, 8, *b"abc"]]


def test_calibration_rows_begin_with_bos_and_have_no_other():
    t = tokenizer()
    documents = [BOOK[:200], BOOK[200:900], "short"]
    got = data.load(documents, t, samples=8, seq_len=20)
    assert (got.tokens == t.bos_token_id).sum(axis=1).tolist() == [1] * len(got.tokens)
    assert (got.tokens[:, 0] == t.bos_token_id).all()
    assert f"each sequence begins with {BOS}" in got.description
    without = data.load(documents, t, samples=8, seq_len=20, bos="no")
    assert t.bos_token_id not in without.tokens
    assert "begins with" not in without.description
    assert (data.load(documents, tokenizer(None), samples=8, seq_len=20, bos="yes").tokens == got.tokens).all()
    with pytest.raises(CalibrationError, match="take longer ones"):
        data.load(documents, t, samples=8, seq_len=1)
