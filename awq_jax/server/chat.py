"""``/v1/chat/completions``: a conversation, answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from awq_jax.serve.engine.request import Piece
from awq_jax.serve.generate import TokenLogprobs
from awq_jax.server import asked, constrained, fields, tools, usage
from awq_jax.server.fields import Fields
from awq_jax.server.messages import Talk, talk_of
from awq_jax.server.problems import Problem
from awq_jax.server.service import Service, merged
from awq_jax.server.sse import Events

Body = dict[str, object]


async def complete(service: Service, http: HttpRequest, body: fields.Json) -> Response:
    """The response to one body."""
    f = Fields(body)
    model = service.model_of(f.text("model", None))
    likely = f.whole("top_logprobs", None, 0, asked.MOST_LOGPROBS)
    if likely is not None and not f.flag("logprobs"):
        raise Problem("top_logprobs is for logprobs: true", param="top_logprobs")
    logprobs = (likely or 0) if f.flag("logprobs") else None
    want = asked.read(f, service.defaults, None, logprobs)
    if want.most == 0:
        raise f.wrong("max_tokens", "at least 1")
    talk = talk_of(service, f)
    grammar = constrained.grammar_of(f)
    service.engine.check_queue()  # before any work
    prompt = await asyncio.to_thread(talk.prompt, service)
    constraints = await asyncio.to_thread(constrained.constraints, service, grammar, want.choices)
    streams = service.begin([prompt], want, constraints=constraints, model=model)
    answers = [Answer(service, talk, i, logprobs is not None) for i in range(want.choices)]
    if want.stream:
        head = usage.head("chat.completion.chunk", "chatcmpl", model) | usage.awaited(want.usage)

        async def chunks() -> AsyncIterator[Body]:
            for answer in answers:
                yield head | {"choices": [answer.delta({"role": "assistant", "content": ""}, None, [])]}
            async for number, piece in merged(streams):
                for choice in answers[number].chunks(piece):
                    yield head | {"choices": [choice]}
            if want.usage:
                yield head | {"choices": [], "usage": usage.counts(streams, want.choices)}

        return Events(service, http, streams, chunks)

    async with service.watching(http, streams):
        async for number, piece in merged(streams):
            answers[number].add(piece)
    head = usage.head("chat.completion", "chatcmpl", model)
    choices = [answer.whole() for answer in answers]
    return JSONResponse(head | {"choices": choices, "usage": usage.counts(streams, want.choices)})


class Answer:
    """One choice.

    Args:
      number: its index.
      logprobs: whether they are shown.
    """

    def __init__(self, service: Service, talk: Talk, number: int, logprobs: bool):
        self.service, self.number, self.logprobs = service, number, logprobs
        self.parser = None if talk.style is None else tools.Parser(talk.style)
        self.text, self.calls = "", list[tools.Call]()
        self.said: list[TokenLogprobs] = []
        self.finish_reason: str | None = None

    def add(self, piece: Piece) -> tuple[str, list[tools.Call]]:
        """What a piece adds to the text and to the calls."""
        if piece.finish_reason == "cancelled":
            raise Problem("the request was cancelled", 499, code="cancelled")
        text, calls = (piece.text, []) if self.parser is None else self.parser.push(piece.text)
        if piece.logprobs is not None:
            self.said.append(piece.logprobs)
        if piece.finish_reason is not None:
            if self.parser is not None:
                more, late = self.parser.finish()
                text, calls = text + more, [*calls, *late]
            called = bool(self.calls or calls) and piece.finish_reason == "stop"
            self.finish_reason = "tool_calls" if called else piece.finish_reason
        self.text += text
        self.calls += calls
        return text, calls

    def chunks(self, piece: Piece) -> list[Body]:
        """What a piece adds, for a stream."""
        before = len(self.calls)
        text, calls = self.add(piece)
        said = [] if piece.logprobs is None else [piece.logprobs]
        found = []
        if calls:
            delta: Body = {"tool_calls": [c.body(before + i) for i, c in enumerate(calls)]}
            found.append(self.delta(({"content": text} if text else {}) | delta, None, said))
        elif text or said:
            found.append(self.delta({"content": text}, None, said))
        if self.finish_reason is not None:
            found.append(self.delta({}, self.finish_reason, []))
        return found

    def delta(self, delta: Mapping[str, object], finish: str | None, said: list[TokenLogprobs]) -> Body:
        """A choice of a chunk."""
        shown = self.shown(said) if self.logprobs and said else None
        return {"index": self.number, "delta": delta, "logprobs": shown, "finish_reason": finish}

    def whole(self) -> Body:
        """A choice of a response."""
        message: Body = {"role": "assistant", "content": self.text, "refusal": None}
        if self.calls:
            message |= {"content": self.text or None, "tool_calls": [c.body() for c in self.calls]}
        shown = self.shown(self.said) if self.logprobs else None
        return {"index": self.number, "message": message, "logprobs": shown, "finish_reason": self.finish_reason}

    def shown(self, said: list[TokenLogprobs]) -> Body:
        """Log probabilities of tokens."""

        def one(token: int, logprob: float) -> Body:
            text = self.service.token_text(token)
            # Of a token that is a part of a character, the bytes are not known here.
            known = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
            return {"token": text, "logprob": logprob, "bytes": known}

        content = [one(s.token, s.logprob) | {"top_logprobs": [one(*pair) for pair in s.likely]} for s in said]
        return {"content": content, "refusal": None}
