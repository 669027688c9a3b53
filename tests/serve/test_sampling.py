"""Each setting of `Sampling` against transformers' processor of that name, or the formula of the API that has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax.errors import ConfigError
from awq_jax.serve import sampling
from awq_jax.serve.sampling import Sampling

V = 40
LOGITS = np.random.default_rng(0).normal(0, 3, (3, V)).astype(np.float32)
PROMPTS = [[1, 2, 3], [4], [5, 5, 39]]
draw = jax.jit(sampling.draw)


def begin(prompts: list[list[int]] = PROMPTS, **settings: Any) -> sampling.Draws:
    return sampling.begin(Sampling(**settings), prompts, V)


def likely(logits: jax.Array, draws: sampling.Draws) -> np.ndarray:
    """What is drawn from, as probabilities."""
    return np.asarray(_likely(logits, draws))


@jax.jit
def _likely(logits: jax.Array, draws: sampling.Draws) -> jax.Array:
    changed = sampling.penalized(sampling.biased(logits, draws), draws)
    return jax.nn.softmax(sampling.kept(sampling.tempered(changed, draws), draws), axis=-1)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_k": 1000},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 0.5, "repetition_penalty": 1.4},
        {"temperature": 1.5, "repetition_penalty": 0.6},
        {"temperature": 1.0, "logit_bias": {0: 3.0, 17: -4.5, 39: 20}},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "logit_bias": {3: 9}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
def test_as_transformers(settings: dict[str, Any]) -> None:
    """All processors at once, in the order in which transformers' own generate puts them."""
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    named = dict(settings)
    if bias := named.pop("logit_bias", None):
        named["sequence_bias"] = [[[token], float(value)] for token, value in bias.items()]
    config = GenerationConfig(do_sample=True, **({"top_k": 0} | named))
    mixin = GenerationMixin()
    mixin.config = type("Config", (), {"is_encoder_decoder": False, "vocab_size": V})()
    processors = mixin._get_logits_processor(config, device="cpu", logits_processor=[])
    assert len(processors) == len([k for k, v in settings.items() if (k, v) != ("temperature", 1.0)])
    got = likely(jnp.asarray(LOGITS), begin(**settings))
    for row, prompt in enumerate(PROMPTS):
        want = processors(torch.tensor([prompt]), torch.tensor(LOGITS[row : row + 1])).softmax(-1)[0].numpy()
        np.testing.assert_array_equal(got[row] == 0, want == 0)
        np.testing.assert_allclose(got[row], want, rtol=2e-5, atol=1e-7)


def test_presence_and_frequency_count_the_answer_only() -> None:
    """``logit - presence * (count > 0) - frequency * count`` (OpenAI API), the prompt not counted."""
    draws = begin(presence_penalty=1.5, frequency_penalty=0.4)
    logits, counts = jnp.asarray(LOGITS), np.zeros((3, V))
    for _ in range(6):
        want = LOGITS - 1.5 * (counts > 0) - 0.4 * counts
        np.testing.assert_allclose(sampling.penalized(logits, draws), want, rtol=1e-6)
        drawn, draws = draw(logits, draws)
        np.testing.assert_array_equal(drawn.ids, want.argmax(axis=1))
        counts[np.arange(3), np.asarray(drawn.ids)] += 1
    assert counts.max() < 6  # else nothing was penalized


def test_repetition_counts_the_answer_too() -> None:
    draws = begin(repetition_penalty=3.0)
    first, draws = draw(jnp.asarray(LOGITS), draws)
    now = np.asarray(sampling.penalized(jnp.asarray(LOGITS), draws))
    for row, prompt in enumerate(PROMPTS):
        seen = {*prompt, int(first.ids[row])}
        for token in range(V):
            x = LOGITS[row, token]
            np.testing.assert_allclose(now[row, token], (x / 3 if x > 0 else x * 3) if token in seen else x, rtol=1e-6)


@pytest.mark.parametrize(
    ("k", "p", "m", "kept"),
    [
        (0, 1.0, 0.0, {0, 1, 2, 3, 4}),
        (2, 1.0, 0.0, {0, 1}),
        (0, 0.5, 0.0, {0, 1}),
        (0, 0.39, 0.0, {0}),
        (0, 0.75, 0.0, {0, 1, 2}),
        (4, 0.5, 0.0, {0, 1}),
        (2, 0.57, 0.0, {0}),  # of the two kept by top_k, the first alone has .4 / .7 = .571
        (2, 0.58, 0.0, {0, 1}),
        (0, 1.0, 0.37, {0, 1, 2}),  # .15 / .4 = .375
        (0, 1.0, 0.38, {0, 1}),
        (0, 0.5, 0.1, {0, 1}),
    ],
)
def test_top_k_then_top_p_then_min_p(k: int, p: float, m: float, kept: set[int]) -> None:
    """Probabilities .4 .3 .15 .1 .05, shuffled."""
    order = np.array([3, 0, 4, 1, 2])
    logits = jnp.log(jnp.array([0.4, 0.3, 0.15, 0.1, 0.05])[order])[None]
    draws = sampling.begin(Sampling(1.0, k, p, m), [[0]], 5)
    left = np.isfinite(np.asarray(sampling.kept(logits, draws))[0])
    assert set(order[left].tolist()) == kept


def test_drawing_follows_the_distribution() -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    logits = jnp.tile(jnp.log(probabilities) * 2.0, (20000, 1))  # temperature 2 undoes the factor
    drawn, _ = draw(logits, sampling.begin(Sampling(2.0), [[0]] * 20000, 4))
    share = np.bincount(np.asarray(drawn.ids), minlength=4) / 20000
    np.testing.assert_allclose(share, probabilities, atol=4 * np.sqrt(0.25 / 20000))


def test_rows_have_their_own_settings() -> None:
    """What a row draws is what it draws alone, whatever stands next to it; a tiny temperature is greedy."""
    rows = [Sampling(), Sampling(1.0, seed=5), Sampling(1e-30, 3), Sampling(2.0, presence_penalty=2.0)]

    def drawn(settings: list[Sampling]) -> np.ndarray:
        draws, got = sampling.begin(settings, [[0]] * len(settings), V), []
        for _ in range(8):
            one, draws = draw(jnp.asarray(np.tile(LOGITS[:1], (len(settings), 1))), draws)
            got.append(np.asarray(one.ids))
        return np.stack(got, axis=1)

    together = drawn(rows)
    for row, said in zip(rows, together, strict=True):
        assert drawn([row])[0].tolist() == said.tolist()
    assert {*together[0], *together[2]} == {LOGITS[0].argmax()}
    assert len({*together[3]}) > 2


def test_streams_of_one_seed_differ_and_are_those_of_jax() -> None:
    logits = jnp.zeros((4, V))
    drawn, draws = draw(logits, sampling.begin(Sampling(1.0, seed=7), [[0]] * 4, V))
    root = jax.random.fold_in(jax.random.key(7), 0)
    want = [int(jax.random.categorical(jax.random.fold_in(root, b), logits[b])) for b in range(4)]
    assert np.asarray(drawn.ids).tolist() == want
    assert len(set(want)) > 1
    assert np.asarray(draws.made).tolist() == [1] * 4
    seeds = sampling.begin(sampling.of_rows(2, {"temperature": 1.0, "seed": [7, 7]}), [[0]] * 2, V)
    assert np.asarray(draw(logits[:2], seeds)[0].ids).tolist() == [want[0]] * 2


def test_log_probabilities_are_those_of_the_model() -> None:
    drawn, _ = draw(jnp.asarray(LOGITS), begin(temperature=3.0, logit_bias={2: 50}, logprobs=3))
    want = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum(axis=1, keepdims=True))
    assert np.asarray(drawn.ids).tolist() == [2, 2, 2]
    np.testing.assert_allclose(drawn.logprobs, want[:, 2], rtol=1e-5)
    top = np.argsort(-want, axis=1)[:, :3]
    np.testing.assert_array_equal(drawn.likely, top)
    np.testing.assert_allclose(drawn.likely_logprobs, np.take_along_axis(want, top, axis=1), rtol=1e-5)
    assert draw(jnp.asarray(LOGITS), begin(logprobs=0))[0].likely.shape == (3, 0)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1.0}, "temperature must be"),
    ({"temperature": float("nan")}, "temperature must be"),
    ({"temperature": "hot"}, "temperature must be .*'hot'"),
    ({"temperature": True}, "temperature must be"),
    ({"top_k": -1}, "top_k must be"),
    ({"top_k": 1.5}, "top_k must be"),
    ({"top_p": 0.0}, "top_p must be"),
    ({"top_p": 1.1}, "top_p must be"),
    ({"min_p": -0.1}, "min_p must be"),
    ({"min_p": 1.1}, "min_p must be"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be"),
    ({"presence_penalty": 2.1}, "presence_penalty must be"),
    ({"frequency_penalty": -3}, "frequency_penalty must be"),
    ({"seed": -1}, "seed must be"),
    ({"seed": 2**32}, "seed must be"),
    ({"stop": ["x", ""]}, "a stop string is empty"),
    ({"stop": [1]}, "stop must be"),
    ({"stop_ids": [-1]}, "stop_ids must be"),
    ({"logit_bias": {1: 101}}, "logit_bias of token 1 must be"),
    ({"logit_bias": {"a": 1}}, "logit_bias maps"),
    ({"logit_bias": {-1: 1}}, "logit_bias maps"),
    ({"logit_bias": 5}, "logit_bias"),
    ({"logprobs": -1}, "logprobs must be"),
    ({"colour": 1}, "unknown settings .'colour'"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=str)
def test_settings_are_checked(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling.from_dict({"temperature": 1.0} | bad)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: begin(stop_ids=[V]), "stop_ids names token 40; the vocabulary has 40"),
        (lambda: begin(logit_bias={99: 1}), "logit_bias names token 99"),
        (lambda: begin(logprobs=41), "logprobs is 41"),
        (lambda: sampling.of_rows(3, {"seed": [1, 2]}), "2 seeds for 3 prompts"),
        (lambda: sampling.begin([Sampling()], [[1], [2]], V), "1 settings of sampling for 2 prompts"),
    ],
)
def test_settings_that_do_not_fit_are_refused(made: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made()


def test_spellings() -> None:
    assert Sampling(stop="x", stop_ids=3).stop == ("x",)
    assert Sampling(logit_bias={"5": 1, 2: 0.5}).logit_bias == ((2, 0.5), (5, 1.0))
    assert hash(Sampling(logit_bias={1: 1})) == hash(Sampling(logit_bias=((1, 1.0),)))
