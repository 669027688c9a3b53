"""A server on a socket: clients that leave, and the end."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import numpy as np
import pytest
import served
import uvicorn

from awq_jax.bench import load
from awq_jax.errors import BackendError
from awq_jax.serve import Engine, Sampling
from awq_jax.server.app import app
from awq_jax.server.metrics import Metrics
from awq_jax.server.running import Server
from awq_jax.server.service import Settings

LONG = {"prompt": "a", "max_tokens": 200, "temperature": 0, "logit_bias": {"257": -100}}


class Running:
    """A server in a thread, which a signal does not reach: it is told to end."""

    def __init__(self, engine, **settings):
        made, self.engine = app(engine, Settings("tiny", **settings), Metrics()), engine
        self.at = threading.Event()
        config = uvicorn.Config(made, log_config=None, port=0, timeout_graceful_shutdown=20)
        self.server = Server(config, made.state.service, self.ready)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        assert self.at.wait(20)

    def ready(self, address):
        self.address = address
        self.at.set()

    def end(self):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def model():
    return served.model(num_hidden_layers=1, max_position_embeddings=256)


def engine_of(model):
    return Engine(model, slots=2, length=250, chunk=16)


def until(says, seconds=10.0):
    end = time.monotonic() + seconds
    while not says():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_who_leaves_frees_a_slot_and_the_others_go_on(model):
    running = Running(engine_of(model))
    [want] = model.answers([[*model.tokenizer("b")["input_ids"]]], max_new_tokens=120, logit_bias={257: -100})
    found = []

    def other():
        body = LONG | {"prompt": "b", "max_tokens": 120}
        found.append(httpx.post(f"{running.address}/v1/completions", json=body, timeout=60).json())

    thread = threading.Thread(target=other)
    thread.start()
    ended = []
    running.engine.watch.finished = lambda request: ended.append(request)
    for stream in (True, False):
        with httpx.Client(base_url=running.address, timeout=60) as client:
            if stream:
                with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/completions", json=LONG, timeout=0.1)
    until(lambda: sum(r.finish_reason == "cancelled" for r in ended) == 2)
    assert all(len(r.ids) < 200 for r in ended)
    thread.join(60)
    assert found[0]["choices"][0]["text"] == want.text
    assert running.engine.load == (0, 0)
    running.end()


def test_at_the_end_answers_are_finished_or_said_to_be_cut(model):
    for drain, whole in ((20.0, True), (0.05, False)):
        running = Running(engine_of(model), drain=drain)
        slow = running.engine.turns.step

        def step(slow=slow):
            time.sleep(0.002)
            slow()

        running.engine.turns.step = step
        with httpx.stream("POST", f"{running.address}/v1/completions", json=LONG | {"stream": True}, timeout=60) as got:
            lines = got.iter_lines()
            next(lines)
            ending = threading.Thread(target=running.end)
            ending.start()
            last = [line for line in lines if line][-1]
        ending.join()
        assert last == "data: [DONE]" if whole else "unavailable" in last
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{running.address}/health")


def test_a_load_is_counted_as_it_was_put(model):
    running = Running(engine_of(model))
    given = {"prompt": 9, "output": 6, "vocabulary": 250, "shared": 3, "seed": 4}
    for kind in ({"concurrency": 3}, {"concurrency": None, "rate": 500.0}):
        put = load.Load(7, **kind, **given)
        assert {tuple(p[:3]) for p in put.prompts()} == {tuple(put.prompts()[0][:3])}
        result = asyncio.run(load.run(f"{running.address}/v1/", put))
        assert (result["answered"], result["failed"], result["model"]) == (7, 0, "tiny")
        assert result["output_tokens_per_second"] * result["seconds"] == pytest.approx(42)
        assert result["prompt_tokens_per_second"] * result["seconds"] == pytest.approx(63)
        assert 0 < result["time_to_first_token"]["p50"] <= result["request_latency"]["p50"] <= result["seconds"]
    with pytest.raises(BackendError, match="context_length_exceeded"):
        asyncio.run(load.run(f"{running.address}/v1/", load.Load(2, prompt=400, vocabulary=250)))
    running.end()
    with pytest.raises(BackendError, match="no OpenAI-compatible server"):
        asyncio.run(load.run(f"{running.address}/v1/", load.Load(1)))


def test_percentiles_are_those_of_the_definition():
    assert load.percentiles(range(1, 101)) == {"mean": 50.5, "p50": 50, "p95": 95, "p99": 99}
    assert load.percentiles([3.0]) == {"mean": 3.0, "p50": 3.0, "p95": 3.0, "p99": 3.0}
    assert load.percentiles([]) is None
    rate = np.diff(load.Load(4000, concurrency=None, rate=8.0).arrivals())
    assert rate.mean() == pytest.approx(1 / 8, rel=0.05)
    assert rate.std() == pytest.approx(1 / 8, rel=0.1)  # of an exponential the two are equal


@pytest.mark.slow
def test_two_hundred_clients_that_leave_at_random(model):
    engine = Engine(model, slots=4, length=128, chunk=16, queue=1000)
    prompts = [[i % 250, i % 7, 3] for i in range(250)]
    want = [list(a.ids) for a in model.answers(prompts[::5], max_new_tokens=24, logit_bias={257: -100})]
    given = Sampling(logit_bias={257: -100})

    async def one(i):
        stream = engine.submit(prompts[i], given, max_new_tokens=24)
        async for piece in stream:
            if i % 5 and len(stream.request.ids) > i % 23:
                break
            if piece.finish_reason:
                return stream.request.ids
        await stream.aclose()

    async def run():
        return await asyncio.gather(*map(one, range(250)))

    found = asyncio.run(run())
    assert found[::5] == want
    until(lambda: engine.load == (0, 0))
    assert engine.programs.late == 0
    engine.stop()
