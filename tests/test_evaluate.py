import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax import evaluate
from awq_jax.errors import CalibrationError, ConfigError, WeightError


def causal(params, tokens):
    """Logits from the mean of the embeddings so far: a model that really looks at its context."""
    x = params["embed"][tokens]
    mean = jnp.cumsum(x, axis=1) / jnp.arange(1, tokens.shape[1] + 1)[:, None]
    return (x + jnp.tanh(mean)) @ params["head"]


@dataclasses.dataclass
class Small:
    params: Any
    apply: Any = causal
    tokenizer: Any = None
    config: Any = None


VOCAB = 13


def small(seed=0, vocab=VOCAB):
    rng = np.random.default_rng(seed)
    return Small(
        {
            "embed": jnp.asarray(rng.normal(size=(vocab, 8)), jnp.float32),
            "head": jnp.asarray(rng.normal(size=(8, vocab)), jnp.float32),
        }
    )


def log_probs(model, tokens):
    """float64 log probabilities [T, V] of one window, from the model's logits."""
    logits = np.asarray(model.apply(model.params, jnp.asarray(tokens)[None])[0], np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def oracle_windows(n, context, stride):
    """(first token read, last token read + 1, targets counted) by plain counting."""
    context = min(context, n - 1)
    done, start, out = 1, 0, []
    while done < n:
        end = min(start + context, n - 1)
        out.append((start, end, range(done, end + 1)))
        done = end + 1
        start += min(stride, context)
    return out


TOKENS = np.random.default_rng(1).integers(0, VOCAB, 60)


@pytest.mark.parametrize(("context", "stride"), [(16, None), (16, 5), (16, 1), (59, None), (500, 100)])
def test_perplexity_counts_every_token_once_and_matches_float64(context, stride):
    model = small()
    got = evaluate.perplexity(model, TOKENS, context=context, stride=stride, batch_size=3)
    per_window, seen = [], []
    for start, end, targets in oracle_windows(len(TOKENS), context, stride or context):
        logp = log_probs(model, TOKENS[start:end])
        per_window.append([-logp[t - 1 - start, TOKENS[t]] for t in targets])
        seen += list(targets)
    assert seen == list(range(1, len(TOKENS)))
    every = np.concatenate(per_window)
    assert got.tokens == len(TOKENS) - 1
    assert got.nll == pytest.approx(every.mean(), rel=1e-6)
    assert got.ppl == pytest.approx(np.exp(every.mean()), rel=1e-5)
    np.testing.assert_allclose(got.window_nll, [sum(w) for w in per_window], rtol=1e-5)
    if len(per_window) == 1:
        assert got.standard_error is None
    else:
        w = len(per_window)
        residual = [sum(v - every.mean() for v in window) for window in per_window]
        expected = np.sqrt(w / (w - 1) * np.sum(np.square(residual))) / len(every)
        assert got.standard_error == pytest.approx(expected, rel=1e-5)


def test_max_tokens_scores_the_first_ones():
    whole = evaluate.perplexity(small(), TOKENS[:21], context=8)
    cut = evaluate.perplexity(small(), TOKENS, context=8, max_tokens=20)
    assert cut.tokens == 20
    assert cut.nll == whole.nll


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batch_size_changes_nothing(batch_size):
    one = evaluate.perplexity(small(), TOKENS, context=8, stride=4, batch_size=2)
    other = evaluate.perplexity(small(), TOKENS, context=8, stride=4, batch_size=batch_size)
    assert other.nll == pytest.approx(one.nll, rel=1e-6)
    assert other.tokens == one.tokens


def test_kl_matches_float64_and_is_zero_for_the_same_model():
    a, b = small(0), small(2)
    got = evaluate.kl(a, b, TOKENS, context=16, batch_size=3)
    expected, same = [], []
    for start, end, targets in oracle_windows(len(TOKENS), 16, 16):
        q, p = log_probs(a, TOKENS[start:end]), log_probs(b, TOKENS[start:end])
        rows = [t - 1 - start for t in targets]
        expected += list((np.exp(p) * (p - q)).sum(-1)[rows])
        same += list((p.argmax(-1) == q.argmax(-1))[rows])
    assert got.kl == pytest.approx(np.mean(expected), rel=1e-5)
    assert got.agreement == pytest.approx(np.mean(same))
    assert got.tokens == len(TOKENS) - 1
    assert evaluate.kl(a, a, TOKENS, context=16).kl == 0.0


def test_difference_is_paired_by_window():
    a, b = (evaluate.perplexity(small(s), TOKENS, context=8) for s in (0, 2))
    delta, error = evaluate.difference(a, b)
    assert delta == pytest.approx(a.nll - b.nll)
    assert error is not None
    assert evaluate.difference(a, a) == (0.0, 0.0)
    near, far = (evaluate.kl(small(s), small(0), TOKENS, context=8) for s in (2, 3))
    apart, error = evaluate.difference(far, near)
    assert apart == pytest.approx(far.kl - near.kl)
    rest = far.window_kl - near.window_kl - apart * far.window_tokens  # of a ratio estimate (Cochran 1977, 6.4)
    assert error == pytest.approx(rest.std(ddof=1) * len(rest) ** 0.5 / far.tokens)
    with pytest.raises(ConfigError, match="different windows"):
        evaluate.difference(a, evaluate.perplexity(small(), TOKENS, context=9))


def test_large_vocabularies_take_smaller_batches(monkeypatch):
    shapes = set()

    def apply(params, tokens):
        shapes.add(tokens.shape)
        return causal(params, tokens)

    monkeypatch.setattr(evaluate, "LOGIT_BYTES", 2 * 4 * 8 * VOCAB)
    evaluate.perplexity(Small(small().params, apply), TOKENS, context=8)
    assert shapes == {(1, 8), (2, 8)}  # the shape probe, and two windows per pass


def test_matches_transformers_loss():
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    tokens = np.random.default_rng(0).integers(0, 32, 41)

    def logits(_, batch):
        shape = jax.ShapeDtypeStruct((*batch.shape, 32), jnp.float32)
        run = lambda b: theirs(torch.from_numpy(np.array(b, np.int64))).logits.detach().numpy()  # noqa: E731
        return jax.pure_callback(run, shape, batch)

    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)[None], labels=torch.from_numpy(tokens)[None]).loss.item()
    assert evaluate.perplexity(Small({}, logits), tokens, context=40).nll == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"context": 0}, "context"),
        ({"context": 8, "stride": 9}, "left out"),
        ({"stride": 0}, "stride"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_settings_are_checked(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        evaluate.perplexity(small(), TOKENS, **kwargs)


def test_context_beyond_the_model_is_refused():
    model = small()
    model.config = type("Config", (), {"max_length": 32})
    with pytest.raises(ConfigError, match="32 positions"):
        evaluate.perplexity(model, TOKENS, context=64)


def test_bad_text_is_refused():
    with pytest.raises(CalibrationError, match="at least 2"):
        evaluate.perplexity(small(), np.array([3]))
    with pytest.raises(CalibrationError, match="token 13"):
        evaluate.perplexity(small(), np.array([3, 13, 1]))
    with pytest.raises(CalibrationError, match="tokenizer"):
        evaluate.perplexity(small(), "text")


def test_different_vocabularies_have_no_kl():
    with pytest.raises(ConfigError, match="13 and 14"):
        evaluate.kl(small(), small(vocab=14), TOKENS)


def test_logits_that_are_not_finite_are_refused():
    model = small()
    model.params["head"] = model.params["head"].at[0, 0].set(jnp.nan)
    with pytest.raises(WeightError, match="not finite"):
        evaluate.perplexity(model, TOKENS)
