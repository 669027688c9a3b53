"""Adapters that requests choose by the name of a model: answers are those of `generate` with that adapter."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import served
from starlette.testclient import TestClient

from awq_jax.adapters.files import Adapter, Factors
from awq_jax.errors import ConfigError
from awq_jax.models.weights import modules
from awq_jax.serve import Engine, Sampling
from awq_jax.server.app import app
from awq_jax.server.metrics import Metrics
from awq_jax.server.service import Settings

RANKS = {"sql": 4, "poems": 2}
NAMES = (None, "sql", "poems")
NEW = 12


@pytest.fixture(scope="module")
def model():
    """A packed model with two adapters; one of them is for attention alone."""
    made = served.model(num_hidden_layers=2, max_position_embeddings=128)
    adapters = {}
    for seed, (name, rank) in enumerate(RANKS.items()):
        rng, factors = np.random.default_rng(seed), {}
        for linear in modules.linears(made.config):
            if linear.module != "lm_head" and (name == "sql" or "self_attn" in linear.module):
                k, n = linear.shape
                a, b = rng.normal(size=(rank, k)) / k**0.5, rng.normal(size=(n, rank))
                factors[linear.module] = Factors(a.astype(np.float32), b.astype(np.float32), 0.5)
        adapters[name] = Adapter(factors, {})
    made.attach(adapters)
    return made


@pytest.fixture(scope="module")
def client(model):
    metrics = Metrics()
    engine = Engine(model, slots=4, length=100, chunk=16, watch=metrics)
    with TestClient(app(engine, Settings("base"), metrics)) as client:
        client.engine = engine
        yield client


def generated(model, prompt, name):
    return list(model.answers([prompt], max_new_tokens=NEW, adapter=name, logit_bias={257: -100})[0].ids)


def test_each_answer_is_that_of_its_adapter_whatever_runs_beside_it(model, client):
    prompts = [np.random.default_rng(i).integers(0, 256, 3 + 9 * i).tolist() for i in range(3)]
    asked = [(p, name) for p in prompts for name in NAMES]
    want = [generated(model, p, name) for p, name in asked]
    assert len({tuple(w) for w in want[:3]}) == 3

    async def one(prompt, name):
        stream = client.engine.submit(prompt, Sampling(logit_bias={257: -100}), max_new_tokens=NEW, adapter=name)
        await stream.text()
        return stream.request.ids

    async def run():
        return await asyncio.gather(*[one(*a) for a in asked])

    assert asyncio.run(run()) == want
    assert client.engine.programs.late == 0


def test_what_one_adapter_has_read_is_not_another_ones(model, client):
    prompt = np.random.default_rng(9).integers(0, 256, 50).tolist()
    used = []
    for name in (*NAMES, *NAMES):

        async def run(name=name):
            stream = client.engine.submit(prompt, Sampling(logit_bias={257: -100}), max_new_tokens=NEW, adapter=name)
            await stream.text()
            return stream.request

        request = asyncio.run(run())
        assert request.ids == generated(model, prompt, name)
        used.append(request.reused)
    assert used == [0, 0, 0, 49, 49, 49]


def test_the_name_of_a_model_chooses(model, client):
    listed = client.get("/v1/models").json()["data"]
    assert [(m["id"], m["parent"]) for m in listed] == [("base", None), ("sql", "base"), ("poems", "base")]
    assert client.get("/v1/models/sql").json()["id"] == "sql"
    ids = model.tokenizer("Once upon")["input_ids"]
    body = {"prompt": ids, "max_tokens": NEW, "temperature": 0, "logit_bias": {"257": -100}}
    for name, adapter in (("base", None), ("sql", "sql"), ("poems", "poems")):
        got = client.post("/v1/completions", json=body | {"model": name}).json()
        assert got["model"] == name
        assert got["choices"][0]["text"] == model.tokenizer.decode(generated(model, ids, adapter), True)
        talk = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0, "model": name}
        [want] = model.generate("Hi", chat=True, max_new_tokens=8, adapter=adapter)
        got = client.post("/v1/chat/completions", json=talk).json()
        assert (got["model"], got["choices"][0]["message"]["content"]) == (name, want)
    for path in ("/v1/completions", "/v1/chat/completions"):
        got = client.post(path, json=body | {"messages": [], "model": "other"})
        assert (got.status_code, got.json()["error"]["code"]) == (404, "model_not_found")
        assert "'sql'" in got.json()["error"]["message"]
    assert "sql, poems" in client.get("/explain").json()["explain"][-2]
    assert client.engine.programs.late == 0


def test_names_that_clash_or_are_not_there_are_refused(client):
    with pytest.raises(ConfigError, match="has the model's name"):
        app(client.engine, Settings("sql"), Metrics())

    async def ask():
        client.engine.submit([1], adapter="other")

    with pytest.raises(ConfigError, match="'sql', 'poems'"):
        asyncio.run(ask())
