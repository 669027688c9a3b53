"""``/v1/completions``: texts, or token ids, continued."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from awq_jax.serve.engine.looking import Prompt
from awq_jax.serve.engine.request import Piece
from awq_jax.serve.engine.stream import Stream
from awq_jax.serve.generate import TokenLogprobs
from awq_jax.server import asked, fields, usage
from awq_jax.server.fields import Fields
from awq_jax.server.problems import Problem
from awq_jax.server.service import Service, merged
from awq_jax.server.sse import Events

MOST_NEW = 16  # where the body does not say, as in the OpenAI API
MOST_PROMPTS = 256


@dataclasses.dataclass
class Told:
    """What one choice has been so far, token by token.

    Attributes:
      offset: characters of the text before the next token.
    """

    offset: int = 0


async def complete(service: Service, http: HttpRequest, body: fields.Json) -> Response:
    """The response to one body."""
    f = Fields(body)
    model = service.model_of(f.text("model", None))
    for name in ("suffix",):
        if f.data.get(name) is not None:
            raise f.wrong(name, "left out: it is not supported")
    logprobs = f.whole("logprobs", None, 0, asked.MOST_LOGPROBS)
    want = asked.read(f, service.defaults, MOST_NEW, logprobs)
    best = f.whole("best_of", want.choices, 1, asked.MOST_CHOICES)
    if best != want.choices:
        raise f.wrong("best_of", "left out, or equal to n")
    echo = f.flag("echo")
    service.engine.check_queue()  # before any work
    prompts = await asyncio.to_thread(_prompts, service, f)
    scored = echo and logprobs is not None
    streams = service.begin(prompts, want, scored, model=model)
    head = usage.head("text_completion", "cmpl", model)
    texts = [_text(service, s.request.prompt) if echo else "" for s in streams]
    told = [Told() for _ in streams]

    def choice(number: int, text: str, finish: str | None, said: list[TokenLogprobs | None]) -> dict[str, object]:
        shown = None if logprobs is None else _logprobs(service, said, told[number], streams[number])
        return {"index": number, "text": text, "logprobs": shown, "finish_reason": finish}

    def echoed(number: int) -> list[TokenLogprobs | None]:
        return [None, *streams[number].request.prompt_logprobs] if scored else []

    if want.stream:
        head |= usage.awaited(want.usage)

        async def chunks() -> AsyncIterator[dict[str, object]]:
            begun = [not echo] * len(streams)
            async for number, piece in merged(streams):
                _check(piece)
                said: list[TokenLogprobs | None] = [] if piece.logprobs is None else [piece.logprobs]
                text = piece.text
                if not begun[number]:
                    begun[number], text, said = True, texts[number] + text, [*echoed(number), *said]
                if text or said or piece.finish_reason:
                    yield head | {"choices": [choice(number, text, piece.finish_reason, said)]}
            if want.usage:
                yield head | {"choices": [], "usage": usage.counts(streams, want.choices)}

        return Events(service, http, streams, chunks)

    parts: list[list[Piece]] = [[] for _ in streams]
    async with service.watching(http, streams):
        async for number, piece in merged(streams):
            _check(piece)
            parts[number].append(piece)
    choices = []
    for number, (text, own) in enumerate(zip(texts, parts, strict=True)):
        said = [*echoed(number), *(p.logprobs for p in own if p.logprobs is not None)]
        choices.append(choice(number, text + "".join(p.text for p in own), own[-1].finish_reason, said))
    return JSONResponse(head | {"choices": choices, "usage": usage.counts(streams, want.choices)})


def _check(piece: Piece) -> None:
    if piece.finish_reason == "cancelled":
        raise Problem("the request was cancelled", 499, code="cancelled")


def _prompts(service: Service, f: Fields) -> list[Prompt]:
    """Each prompt: a text, ids, or a list of either."""
    given = f.data.get("prompt")
    if isinstance(given, str) or fields.is_ids(given):
        given = [given]
    if not isinstance(given, list) or not given or not all(isinstance(p, str) or fields.is_ids(p) for p in given):
        raise f.wrong("prompt", "a string, a list of token ids, or a list of such")
    if len(given) > MOST_PROMPTS:
        raise f.wrong("prompt", f"at most {MOST_PROMPTS} prompts")
    return [service.engine.prepared(f.encodable(p, "prompt") if isinstance(p, str) else p) for p in given]


def _text(service: Service, ids: list[int]) -> str:
    return service.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _logprobs(service: Service, said: list[TokenLogprobs | None], told: Told, stream: Stream) -> dict[str, object]:
    """Of some tokens; None stands for the first of a prompt, which nothing comes before."""
    tokens, offsets, likely = [], [], []
    for one in said:
        text = service.token_text(stream.request.prompt[0] if one is None else one.token)
        tokens.append(text)
        offsets.append(told.offset)
        told.offset += len(text)
        likely.append(None if one is None else {service.token_text(i): p for i, p in one.likely})
    return {
        "tokens": tokens,
        "token_logprobs": [None if one is None else one.logprob for one in said],
        "top_logprobs": likely,
        "text_offset": offsets,
    }
