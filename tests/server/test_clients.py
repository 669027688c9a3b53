"""Other people's clients, unchanged, against a server on a socket."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import served
import tiny_checkpoints
import uvicorn

from awq_jax.serve import Engine
from awq_jax.server.app import app
from awq_jax.server.metrics import Metrics
from awq_jax.server.running import Server
from awq_jax.server.service import Settings

TALK = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def model():
    return served.model(num_hidden_layers=1, max_position_embeddings=256)


@pytest.fixture(scope="module")
def address(model):
    made = app(Engine(model, slots=2, length=250, chunk=64), Settings("tiny", ("secret",)), Metrics())
    ready, found = threading.Event(), []
    config = uvicorn.Config(made, log_config=None, port=0)
    server = Server(config, made.state.service, lambda at: (found.append(at), ready.set()))
    thread = threading.Thread(target=server.run)
    thread.start()
    assert ready.wait(20)
    yield f"{found[0]}/v1"
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def want(model):
    [text] = model.generate(TALK, chat=True, max_new_tokens=10)
    return text


def test_openai(address, want):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=address, api_key="secret", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == ["tiny"]
        given = {"model": "tiny", "messages": TALK, "temperature": 0, "max_completion_tokens": 10}
        found = client.chat.completions.create(**given, logprobs=True, top_logprobs=2, n=2)
        assert [c.message.content for c in found.choices] == [want, want]
        assert len(found.choices[0].logprobs.content[0].top_logprobs) == 2
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
        chunks = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == want
        assert chunks[-1].usage.completion_tokens == found.usage.completion_tokens / 2
        text = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3, echo=True, logprobs=1)
        assert [c.text[0] for c in text.choices] == ["a", "b"]
        with pytest.raises(openai.BadRequestError) as told:
            client.completions.create(model="tiny", prompt="a" * 300)
        assert told.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=address, api_key="wrong", max_retries=0).models.list()


@pytest.mark.slow
def test_langchain(address, want):
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(base_url=address, api_key="secret", model="tiny", temperature=0, max_tokens=10)
    assert chat.invoke("Hi").content == want
    assert "".join(piece.content for piece in chat.stream("Hi")) == want
    assert [m.content for m in chat.batch(["Hi", "Hi"])] == [want, want]


@pytest.mark.slow
def test_lm_eval(address, model, monkeypatch, tmp_path):
    api = pytest.importorskip("lm_eval.models.openai_completions")
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    tiny_checkpoints.tokenizer().save_pretrained(tmp_path)
    given = {"model": "tiny", "tokenizer": str(tmp_path), "max_length": 200}
    lm = api.LocalCompletionsAPI(base_url=f"{address}/completions", **given)
    request = Instance("generate_until", {}, ("Once", {"until": ["zzz"], "max_gen_toks": 6}), 0)
    [text] = lm.generate_until([request])
    assert text == model.generate("Once", max_new_tokens=6)[0]
    [(logprob, greedy)] = lm.loglikelihood([Instance("loglikelihood", {}, ("Once", " upon"), 0)])
    ids = model.tokenizer("Once upon")["input_ids"]
    logits = np.asarray(model(np.array([ids])), np.float64)[0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert logprob == pytest.approx(sum(logprobs[i - 1, ids[i]] for i in range(4, 9)), abs=1e-3)
    assert greedy == all(logprobs[i - 1].argmax() == ids[i] for i in range(4, 9))
