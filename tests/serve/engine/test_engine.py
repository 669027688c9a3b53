"""An engine against `Model.generate`: the same tokens, whatever runs beside them, and nothing compiled on the way."""

from __future__ import annotations

import asyncio
import gc
import threading

import jax
import numpy as np
import pytest
import served

from awq_jax.errors import BusyError, ConfigError, EngineError, ShapeError
from awq_jax.kernels import native_attention
from awq_jax.serve import Engine, Sampling
from awq_jax.serve.engine.engine import NEAR_TIE

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, n).tolist() for n in (1, 40, 3, 17, 16, 9, 33, 5, 12)]


@pytest.fixture(scope="module")
def model():
    return served.model(num_hidden_layers=1)


@pytest.fixture(scope="module")
def engine(model):
    made = Engine(model, slots=3, length=64, chunk=16)
    yield made
    made.stop(drain=False)


@pytest.fixture
def compiled():
    """What JAX compiles, by its own events."""
    names = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: names.append(event))
    return lambda: sum("backend_compile" in n for n in names)


def generated(model, prompts, **settings):
    return [list(model.answers([p], **settings)[0].ids) for p in prompts]


def test_greedy_answers_are_those_of_generate_and_nothing_is_compiled(model, engine, compiled):
    want = generated(model, PROMPTS, max_new_tokens=12)
    assert len({tuple(w) for w in want}) > 5
    before = compiled()
    assert served.answers(engine, PROMPTS, max_new_tokens=12) == want
    assert compiled() == before
    assert engine.programs.late == 0
    assert engine.load == (0, 0)


def test_what_is_drawn_is_that_of_generate(model, engine):
    settings = [
        {"temperature": 0.9},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.7},
        {"temperature": 1.3, "top_k": 7, "top_p": 0.9, "min_p": 0.01, "seed": 5},
        {"logit_bias": {7: 50.0}, "stop_ids": (9,)},
        {},
    ]
    want = [generated(model, [p], max_new_tokens=10, **s)[0] for p, s in zip(PROMPTS, settings, strict=False)]
    given = [Sampling(**s) for s in settings]
    assert served.answers(engine, PROMPTS[:5], given, max_new_tokens=10) == want
    assert engine.programs.late == 0


def test_log_probabilities_are_those_of_the_model(model, engine):
    stream, got = None, []

    async def run():
        nonlocal stream
        stream = engine.submit(PROMPTS[1], Sampling(logprobs=3), max_new_tokens=6, scored=True)
        got.extend([piece async for piece in stream])

    asyncio.run(run())
    whole = [*PROMPTS[1], *stream.request.ids]
    oracle = np.asarray(model(np.array([whole])), np.float64)[0]
    oracle -= np.log(np.exp(oracle).sum(axis=-1, keepdims=True))
    said = [*stream.request.prompt_logprobs, *(piece.logprobs for piece in got)]
    assert [s.token for s in said] == whole[1:]
    for at, one in enumerate(said):
        assert one.logprob == pytest.approx(oracle[at, one.token], abs=1e-4)
        assert [p for _, p in one.likely] == pytest.approx(np.sort(oracle[at])[::-1][:3], abs=1e-4)
    assert got[-1].finish_reason == "length"


@pytest.mark.parametrize("packed", [False, True])
def test_two_answers_part_only_where_two_tokens_are_nearly_equal(packed):
    """Sixteen at once, with compiled attention where there is some: log probabilities are the model's to half of
    `NEAR_TIE`, so a token that is not the model's best is nearly as good."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = served.model(packed=packed, num_hidden_layers=2, **sizes)
    made = Engine(model, slots=16, length=64, chunk=16)
    step = next(c for (name, *_), c in made.programs._programs.items() if name == "step")
    assert isinstance(native_attention.obstacle(*[np.zeros((1, 1, 1, 16), np.float32)] * 3), str) or (
        native_attention.SYMBOL in step.as_text()
    )
    prompts = [RNG.integers(0, 256, n).tolist() for n in range(3, 35, 2)]
    streams = []

    async def one(prompt):
        streams.append(made.submit(prompt, Sampling(logprobs=0), max_new_tokens=12, ignore_eos=True))
        return [piece.logprobs.logprob async for piece in streams[-1]]

    async def run():
        return await asyncio.gather(*map(one, prompts))

    for stream, said in zip(streams, asyncio.run(run()), strict=True):
        whole = [*stream.request.prompt, *stream.request.ids]
        logits = np.asarray(model(np.array([whole[:-1]])), np.float64)[0, len(stream.request.prompt) - 1 :]
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        chosen = logprobs[np.arange(12), stream.request.ids]
        assert np.abs(chosen - said).max() < NEAR_TIE / 2
        assert (logprobs.max(axis=-1) - chosen).max() < NEAR_TIE
    made.stop()


def test_what_prompts_share_is_read_once(model, engine):
    shared = RNG.integers(0, 256, 35).tolist()
    prompts = [[*shared, *tail] for tail in ([1], [2, 3], [4, 5, 6])]
    want = generated(model, prompts, max_new_tokens=8)
    assert served.answers(engine, prompts[:1], max_new_tokens=8) == want[:1]

    async def run():
        streams = [engine.submit(p, max_new_tokens=8) for p in prompts[1:]]
        await asyncio.gather(*[s.text() for s in streams])
        return streams

    streams = asyncio.run(run())
    assert [s.request.ids for s in streams] == want[1:]
    assert [s.request.reused for s in streams] == [35, 35]
    assert engine.programs.late == 0


def test_answers_that_nobody_reads_give_their_slot_back(model, engine):
    want = generated(model, PROMPTS[4:5], max_new_tokens=40)

    async def run():
        read = engine.submit(PROMPTS[4], max_new_tokens=40)
        closed, dropped = (engine.submit(p, Sampling(logit_bias={257: -100}), max_new_tokens=20) for p in PROMPTS[:2])
        waiting = engine.submit(PROMPTS[2])
        requests = [s.request for s in (closed, dropped, waiting)]
        await closed.aclose()
        waiting.cancel()
        async for _ in dropped:
            break
        del dropped
        gc.collect()
        await read.text()
        return read.request.ids, requests

    ids, requests = asyncio.run(run())
    assert ids == want[0]
    assert [r.finish_reason for r in requests] == ["cancelled"] * 3
    assert all(len(r.ids) < 20 for r in requests)
    assert engine.load == (0, 0)


def test_what_cannot_be_done_is_refused_before_work(model, engine):
    async def run():
        for prompt, new, says in (([], 1, "no tokens"), ([999], 1, "vocabulary"), ([1] * 60, 9, "60 tokens and 9")):
            with pytest.raises(ShapeError, match=says):
                engine.submit(prompt, max_new_tokens=new)
        with pytest.raises(ConfigError, match="at most 20"):
            engine.submit([1], Sampling(logprobs=21))
        with pytest.raises(ConfigError, match="logit_bias names token 999"):
            engine.submit([1], Sampling(logit_bias={999: 1.0}))

    asyncio.run(run())
    for wrong in ({"slots": 0}, {"length": 65}, {"kv_bits": 4}, {"queue": -1}, {"slots": 10**10}):
        with pytest.raises(ConfigError, match=r"slots|length|kv_bits|queue"):
            Engine(model, **wrong)


def test_a_full_queue_refuses_and_a_failed_step_ends_what_was_in_it(model, engine, monkeypatch):
    monkeypatch.setattr(engine, "queue", 1)
    hold = threading.Event()

    def fails(*_):
        hold.wait(10)
        del engine.turns.step  # only once
        raise RuntimeError("no memory")

    async def run():
        engine.turns.step = fails
        streams = [engine.submit([i], Sampling(logit_bias={257: -100}), max_new_tokens=5) for i in (1, 2, 3, 4)]
        with pytest.raises(BusyError, match="requests wait already"):
            engine.submit([5])
        hold.set()
        ended = await asyncio.gather(*[s.text() for s in streams[:3]], return_exceptions=True)
        await streams[3].text()
        return ended, streams[3].request.finish_reason

    ended, last = asyncio.run(run())
    assert all(isinstance(e, EngineError) and "no memory" in str(e) for e in ended[:2])
    assert last == "length"
    assert served.answers(engine, PROMPTS[:2], max_new_tokens=4) == generated(model, PROMPTS[:2], max_new_tokens=4)


def test_a_stopped_engine_finishes_what_it_has(model):
    engine = Engine(model, slots=1, length=32, chunk=16)

    async def run():
        streams = [engine.submit([i], Sampling(logit_bias={257: -100}), max_new_tokens=9) for i in (1, 2)]
        await asyncio.to_thread(engine.stop)
        texts = await asyncio.gather(*[s.text() for s in streams])
        with pytest.raises(EngineError, match="stopped"):
            engine.submit([1])
        return texts, [s.request.made for s in streams]

    assert asyncio.run(run())[1] == [9, 9]
