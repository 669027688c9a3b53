"""Images as data URLs: answers are those of `generate` with what the checkpoint's processor returns."""

from __future__ import annotations

import asyncio
import base64
import io

import jax
import multimodal
import numpy as np
import pytest
from starlette.testclient import TestClient

import awq_jax
from awq_jax.errors import ShapeError
from awq_jax.serve import Engine, Sampling
from awq_jax.server.app import app
from awq_jax.server.metrics import Metrics
from awq_jax.server.service import Settings

pytest.importorskip("PIL")
from PIL import Image

NEW = 5
FAST = ("qwen2_vl",)
CASES = [c for c in multimodal.CASES if c.name != "llava-siglip"]


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(
    scope="module",
    params=[pytest.param(c, id=c.name, marks=[] if c.name in FAST else [pytest.mark.slow]) for c in CASES],
)
def served(request, tmp_path_factory):
    """A case, its directory, its model, and a client of its server."""
    directory = tmp_path_factory.mktemp(request.param.name)
    multimodal.save(request.param, directory)
    model = awq_jax.load(directory)
    metrics = Metrics()
    engine = Engine(model, slots=2, length=60, chunk=16, watch=metrics, image_tokens=16)
    with TestClient(app(engine, Settings("tiny"), metrics)) as client:
        client.engine = engine
        yield request.param, directory, model, client


def picture(seed: int, size: tuple[int, int] = (30, 22)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))


def url(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def shown(*urls: str) -> list[dict[str, object]]:
    """A conversation with images."""
    parts = [part for u in urls for part in ({"type": "image_url", "image_url": {"url": u}}, text("t5 t6"))]
    return [{"role": "system", "content": "t3"}, {"role": "user", "content": [text("t4"), *parts]}]


def text(said: str) -> dict[str, object]:
    return {"type": "text", "text": said}


def chat(client, messages, **body):
    body = {"messages": messages, "temperature": 0, "max_tokens": NEW, "logit_bias": {"2": -100}} | body
    return client.post("/v1/chat/completions", json=body)


def wanted(case, directory, model, *images):
    """The tokens of `generate` with the same conversation."""
    mark = multimodal.MARKS.get(case.family, "<|image_pad|>")
    said = " ".join(["t3", "t4", *([mark, "t5", "t6"] * len(images)), "t9"])
    given = multimodal.processed(case, directory, said, list(images))
    [answer] = model.answers(given, max_new_tokens=NEW, logit_bias={2: -100})
    return answer.text, given["input_ids"].size


def test_answers_to_images_are_those_of_generate(served):
    case, directory, model, client = served
    pictures = [picture(1), picture(2), picture(3, (16, 40))]
    want = [wanted(case, directory, model, p) for p in pictures]
    for image, (answer, tokens) in zip(pictures, want, strict=True):
        got = chat(client, shown(url(image)), n=2).json()
        assert [c["message"]["content"] for c in got["choices"]] == [answer] * 2
        assert got["usage"]["prompt_tokens"] == tokens
    if case.family != "gemma3":  # a random Gemma repeats one token whatever it sees
        assert len({answer for answer, _ in want}) > 1
    again = chat(client, shown(url(pictures[1]))).json()
    assert again["choices"][0]["message"]["content"] == want[1][0]
    both, tokens = wanted(case, directory, model, *pictures[:2])
    got = chat(client, shown(*map(url, pictures[:2]))).json()
    assert got["choices"][0]["message"]["content"] == both
    [plain] = model.answers([[3, 4, 9]], max_new_tokens=NEW, logit_bias={2: -100})
    got = chat(client, [{"role": "user", "content": "t3 t4"}]).json()
    assert got["choices"][0]["message"]["content"] == plain.text
    assert client.engine.programs.late == 0


def test_prompts_share_what_was_read_only_of_the_same_image(served):
    case, directory, model, _ = served
    engine, given = Engine(model, slots=3, length=60, chunk=16, image_tokens=16), []
    mark = multimodal.MARKS.get(case.family, "<|image_pad|>")
    for seed, last in ((1, "t7"), (1, "t8"), (2, "t8")):
        said = f"{'t4 ' * 20}{mark} t5 {last}"
        given.append(multimodal.processed(case, directory, said, [picture(seed)]))
    reused = []
    for one in given:
        [want] = model.answers(one, max_new_tokens=NEW, logit_bias={2: -100})

        async def run(one=one):
            stream = engine.submit(one, Sampling(logit_bias={2: -100}), max_new_tokens=NEW)
            await stream.text()
            return stream.request

        request = asyncio.run(run())
        assert tuple(request.ids) == want.ids
        reused.append(request.reused)
    length, token = given[0]["input_ids"].size, model.config.vision.token
    assert reused == [0, length - 1, int(np.argmax(given[0]["input_ids"] == token))]

    async def refused(prompt):
        engine.submit(prompt)

    with pytest.raises(ShapeError, match="tokens of images"):
        asyncio.run(refused([4, token, 5]))
    engine.stop()


def test_what_is_no_image_is_refused(served):
    _, _, _, client = served
    good = url(picture(1))
    large = url(Image.new("1", (1 << 13, 1 << 13)))
    wrong = {
        "https://example.com/a.png": "fetches nothing",
        "http://127.0.0.1:1/a.png": "fetches nothing",
        "file:///etc/passwd": "fetches nothing",
        "/etc/passwd": "fetches nothing",
        "data:text/plain;base64,aGk=": "fetches nothing",
        "data:image/png,aGk=": "fetches nothing",
        "data:image/png;base64,a": "not base64",
        "data:image/png;base64,aGk=": "cannot be read",
        good[:-40]: "",
        large: "8192 x 8192 pixels",
        "": "fetches nothing",
    }
    for given, says in wrong.items():
        got = chat(client, shown(good, given))
        assert got.status_code == 400, given[:40]
        assert says in got.json()["error"]["message"]
    for part in ({"type": "image_url"}, {"type": "image_url", "image_url": {"url": 5}}, {"type": "input_audio"}):
        assert chat(client, [{"role": "user", "content": [part]}]).status_code == 400
    assert "at most 32" in chat(client, shown(*[good] * 33)).json()["error"]["message"]
    mark = "<|image_pad|> <image> <start_of_image> <image_soft_token>"
    assert chat(client, [{"role": "user", "content": mark}]).status_code == 400
    assert chat(client, shown(url(picture(1), "JPEG"))).status_code == 200
    assert chat(client, shown(url(picture(1).convert("P"), "GIF"))).status_code == 200
    assert client.engine.programs.late == 0
