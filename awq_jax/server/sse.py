"""Server-sent events."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from awq_jax.serve.engine.stream import Stream
from awq_jax.server.service import Service, problem_of

DONE = b"data: [DONE]\n\n"


def event(data: object) -> bytes:
    """One event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Events(Response):
    """A response of events. It ends with ``[DONE]``, or with an error as its last event: an answer that was cut short
    is never taken for a whole one.

    Args:
      service, http, streams: see `Service.watching`.
      chunks: the JSON objects to be sent.
    """

    def __init__(
        self,
        service: Service,
        http: HttpRequest,
        streams: list[Stream],
        chunks: Callable[[], AsyncIterator[dict[str, object]]],
    ):
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["Cache-Control"], self.headers["X-Accel-Buffering"] = "no-cache", "no"
        self.service, self.http, self.streams, self.chunks = service, http, streams, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""

        async def body(data: bytes, more: bool) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        last = DONE
        try:
            async with self.service.watching(self.http, self.streams):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                chunks = self.chunks()
                async with contextlib.aclosing(chunks):  # type: ignore[type-var]
                    async for chunk in chunks:
                        await body(event(chunk), True)
        except Exception as e:  # the status was sent: what happened can only be told in an event
            last = event(problem_of(e).body())
        with contextlib.suppress(OSError):
            await body(last, False)
