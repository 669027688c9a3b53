"""The routes on a random model: against `generate`, in OpenAI's shapes; and what is refused."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import served
from starlette.testclient import TestClient

from awq_jax.serve import Engine
from awq_jax.server.app import app
from awq_jax.server.metrics import Metrics
from awq_jax.server.service import Settings

PROMPT = "Once upon"
TALK = [{"role": "system", "content": "Be short."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
LONG = {"logit_bias": {"257": -100}}  # never ends by itself


@pytest.fixture(scope="module")
def model():
    return served.model(num_hidden_layers=1, max_position_embeddings=128)


@pytest.fixture(scope="module")
def client(model):
    metrics = Metrics()
    engine = Engine(model, slots=3, length=100, chunk=32, watch=metrics, queue=8)
    with TestClient(app(engine, Settings("tiny", body_limit=4000, timeout=60), metrics)) as client:
        client.engine = engine
        yield client


def complete(client, **body):
    return client.post("/v1/completions", json={"prompt": PROMPT, "temperature": 0} | body)


def chat(client, **body):
    return client.post("/v1/chat/completions", json={"messages": TALK, "temperature": 0} | body)


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def test_completions_are_those_of_generate(client, model):
    ids = model.tokenizer(PROMPT)["input_ids"]
    [want] = model.answers([ids], max_new_tokens=16)
    body = complete(client).json()
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    [choice] = body["choices"]
    assert choice == {"index": 0, "text": want.text, "logprobs": None, "finish_reason": want.finish_reason}
    assert body["usage"]["prompt_tokens"] == len(ids)
    assert body["usage"]["completion_tokens"] == want.completion_tokens
    several = complete(client, prompt=[PROMPT, ids, "x"], n=2, max_tokens=5).json()
    texts = [c["text"] for c in several["choices"]]
    assert [c["index"] for c in several["choices"]] == list(range(6))
    assert texts[0] == texts[1] == texts[2] == texts[3] == want.text[: len(texts[0])]
    assert several["usage"]["prompt_tokens"] == 2 * len(ids) + 1


def test_a_stream_is_the_same_in_pieces(client):
    whole = complete(client, max_tokens=30, n=2, temperature=0.8, seed=3, **LONG).json()
    body = {"max_tokens": 30, "n": 2, "temperature": 0.8, "seed": 3, "stream": True} | LONG
    said = events(complete(client, stream_options={"include_usage": True}, **body))
    assert said[-1] == "[DONE]"
    chunks = [json.loads(e) for e in said[:-1]]
    assert len({c["id"] for c in chunks}) == 1
    assert chunks[-1]["usage"]["completion_tokens"] == 60
    assert [c["usage"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    texts = ["", ""]
    for c in chunks[:-1]:
        texts[c["choices"][0]["index"]] += c["choices"][0]["text"]
    assert texts == [c["text"] for c in whole["choices"]]
    assert texts[0] != texts[1]


def test_echo_has_log_probabilities_of_the_prompt(client, model):
    [choice] = complete(client, echo=True, logprobs=2, max_tokens=1).json()["choices"]
    ids = model.tokenizer(PROMPT)["input_ids"]
    logits = np.asarray(model(np.array([ids])), np.float64)[0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    told = choice["logprobs"]
    assert told["tokens"][: len(ids)] == list(PROMPT)
    assert told["text_offset"][: len(ids)] == list(range(len(ids)))
    assert told["token_logprobs"][0] is None
    want = logprobs[np.arange(len(ids) - 1), ids[1:]]
    assert told["token_logprobs"][1 : len(ids)] == pytest.approx(want, abs=1e-4)
    assert max(told["top_logprobs"][1].values()) == pytest.approx(logprobs[0].max(), abs=1e-4)
    assert choice["text"].startswith(PROMPT)
    [streamed] = map(json.loads, events(complete(client, echo=True, logprobs=2, max_tokens=1, stream=True))[:-1])
    assert streamed["choices"][0]["logprobs"] == told


def test_chats(client, model):
    flat = [TALK[0], {"role": "user", "content": "Hi"}]
    [want] = model.generate(flat, chat=True, max_new_tokens=8)
    body = chat(client, max_completion_tokens=8, logprobs=True, top_logprobs=3).json()
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": want, "refusal": None}
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == body["usage"]["completion_tokens"] - (choice["finish_reason"] == "stop")
    assert all(t["top_logprobs"][0]["logprob"] == t["logprob"] for t in tokens)  # greedy
    said = [json.loads(e) for e in events(chat(client, max_tokens=8, stream=True))[:-1]]
    deltas = [c["choices"][0]["delta"] for c in said]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(d.get("content", "") for d in deltas) == want
    assert said[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    stop = want[3:5]
    assert chat(client, max_tokens=8, stop=stop).json()["choices"][0]["message"]["content"] == want[: want.index(stop)]


def test_models_health_page_and_metrics(client):
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["max_model_len"] == 100
    assert client.get("/v1/models/no/such").json()["error"]["code"] == "model_not_found"
    assert client.get("/health").json() == {"status": "ok"}
    assert "<!doctype html>" in client.get("/").text
    assert any("3 slots" in line for line in client.get("/explain").json()["explain"])
    before, made = client.get("/metrics").text, complete(client, max_tokens=3, **LONG)
    assert made.status_code == 200
    names = "generation_tokens_total", "time_to_first_token_seconds_count", "inter_token_latency_seconds_count"
    grown = [value(client.get("/metrics").text, n) - value(before, n) for n in names]
    assert grown == [3, 1, 2]
    assert value(before, "programs_compiled_late") == 0


def value(text, name):
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"awq_jax_{name} "))


SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "why": {"enum": ["a", "b"]}},
    "required": ["sure", "why"],
    "additionalProperties": False,
}


def test_answers_fit_a_schema_whatever_the_model_would_say(client):
    pytest.importorskip("llguidance")
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    got = chat(client, response_format=asked, n=2, temperature=1.5, seed=1, max_tokens=50).json()
    for choice in got["choices"]:
        assert choice["finish_reason"] == "stop"
        found = json.loads(choice["message"]["content"])
        assert set(found) == {"sure", "why"}
        assert found["why"] in ("a", "b")
    assert client.engine.programs.late == 0
    wrong = {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}
    assert chat(client, response_format=wrong).json()["error"]["param"] == "response_format"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": ""}, 400, None),
        ({"prompt": [5, -1]}, 400, "prompt"),
        ({"prompt": [5, 9999]}, 400, None),
        ({"prompt": "\ud800"}, 400, "prompt"),
        ({"model": "other"}, 404, "model"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 2}, 400, "top_p"),
        ({"n": 0}, 400, "n"),
        ({"n": True}, 400, "n"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": 1.5}, 400, "max_tokens"),
        ({"logprobs": 99}, 400, "logprobs"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": 7}, 400, "stop"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"5": 1000}}, 400, "5"),
        ({"logit_bias": {"5000": 1}}, 400, None),
        ({"seed": "a"}, 400, "seed"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream_options": {}}, 400, "stream_options"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"best_of": 3}, 400, "best_of"),
    ],
)
def test_wrong_fields_are_named(client, body, status, param):
    # json= of the client would refuse to send half a surrogate pair.
    text = json.dumps({"prompt": PROMPT, "max_tokens": 1} | body)
    got = client.post("/v1/completions", content=text)
    assert got.status_code == status
    error = got.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").split(".")[-1] == (param or "")
    assert len(error["message"]) > 10


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": [7]},
        {"messages": [{"role": "king", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"top_logprobs": 3},
        {"max_tokens": 0},
        {"response_format": {"type": "yaml"}},
        {"chat_template_kwargs": {"tokenize": False}},
    ],
)
def test_wrong_chats_are_refused(client, body):
    got = chat(client, **body)
    assert got.status_code == 400
    assert got.json()["error"]["message"]


def test_what_is_too_long_is_refused(client):
    got = complete(client, prompt="x" * 99, max_tokens=9)
    assert got.status_code == 400
    assert got.json()["error"]["code"] == "context_length_exceeded"
    assert complete(client, prompt="x" * 5000).status_code == 413
    parts = client.post("/v1/completions", content=(b" " * 1000 for _ in range(9)))  # no length is declared
    assert parts.status_code == 413
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 3000):
        assert client.post("/v1/completions", content=body).json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/nowhere").json()["error"]["code"] == "not_found"


def test_a_key_is_asked_for_before_anything_is_read(client):
    with TestClient(app(client.engine, Settings("tiny", ("secret",)), Metrics())) as locked:
        client.engine.stop = lambda *_: None  # its own application still needs it
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "secret"}):
            got = locked.post("/v1/completions", content=b"{", headers=headers)
            assert (got.status_code, got.json()["error"]["code"]) == (401, "invalid_api_key")
        assert locked.get("/metrics").status_code == 401
        given = locked.get("/v1/models", headers={"Authorization": "Bearer secret"})
        assert given.status_code == 200
        assert locked.get("/health").status_code == 200
    del client.engine.stop


def test_a_full_queue_says_when_to_come_back(client):
    got = complete(client, n=20)
    assert got.status_code == 429
    assert got.headers["retry-after"] == "1"
    assert complete(client, max_tokens=1).status_code == 200


def mutated(rng, body):
    """A body with something wrong in it."""
    keys = ["prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "stream", "tools"]
    keys += ["logit_bias", "logprobs", "top_logprobs", "echo", "model", "response_format", "stream_options", "role"]
    odd = [None, True, -1, 0, 1e308, 10**30, "", "x", "\u0000\ud83d", [], [[]], {}, {"type": "json_schema"}, [1, "a"]]
    odd += [{"a": {"b": [1]}}, ["a"] * 5, {"5": 1}, [{"role": "user", "content": {}}], [{}], float("nan"), 2]
    out = dict(body)
    for _ in range(rng.randint(1, 3)):
        out[rng.choice(keys)] = rng.choice(odd)
    text = json.dumps(out).encode()
    if rng.random() < 0.2:
        at = rng.randrange(len(text))
        text = text[:at] + bytes([rng.randrange(256)]) + text[at + rng.randint(0, 2) :]
    return text


def fuzz(client, count):
    rng = random.Random(0)
    kinds = {"/v1/completions": {"prompt": "a"}, "/v1/chat/completions": {"messages": TALK}}
    seen = []
    for _ in range(count):
        path, body = rng.choice(list(kinds.items()))
        got = client.post(path, content=mutated(rng, body | {"max_tokens": 1}))
        seen.append(got.status_code)
        assert got.status_code in (200, 400, 404, 429, 501), got.text
        assert got.status_code == 200 or got.json()["error"]["message"]
    return seen


def test_malformed_bodies_are_never_our_fault(client):
    assert len(set(fuzz(client, 40))) > 1


@pytest.mark.slow
def test_many_malformed_bodies_are_never_our_fault(client):
    fuzz(client, 1000)
    assert client.engine.programs.late == 0
