"""The engine as the routes see it: choices of a request, watched for a client that leaves and for time that is up."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request as HttpRequest

from awq_jax.convert.text import TokenizerLike
from awq_jax.serve.engine.engine import Engine
from awq_jax.serve.engine.looking import Prompt
from awq_jax.serve.engine.request import Constraint, Piece
from awq_jax.serve.engine.stream import Stream
from awq_jax.serve.prompts import needed
from awq_jax.server.asked import Asked, Defaults
from awq_jax.server.pictures import Processor
from awq_jax.server.problems import Problem, of

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the one who starts a server decides.

    Attributes:
      name: of the model, as clients call it.
      api_keys: one of which a client must have; none: anybody may ask.
      body_limit: bytes of a request; None: 4 MiB, and 32 for a model that looks at images.
      timeout: seconds that a request may take.
      drain: seconds that requests have to finish once the server is told to end.
    """

    name: str
    api_keys: tuple[str, ...] = ()
    body_limit: int | None = None
    timeout: float = 600.0
    drain: float = 30.0


class Service:
    """What all routes need.

    Args:
      engine: with its model.
      settings: see there.
    """

    def __init__(self, engine: Engine, settings: Settings):
        self.engine, self.settings = engine, settings
        self.defaults = Defaults.of(engine.model.source.generation_config)
        self.draining = False
        looks = engine.programs.config.vision is not None
        self.body_limit = settings.body_limit or (32 << 20 if looks else 4 << 20)
        self.processor = Processor(engine) if looks else None

    @property
    def tokenizer(self) -> TokenizerLike:
        """The model's."""
        return needed(self.engine.model.tokenizer)

    def token_text(self, token: int) -> str:
        """One token as text; a part of a character is a replacement character."""
        return self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @property
    def models(self) -> tuple[str, ...]:
        """What clients can ask for: the model itself, and with each adapter."""
        return self.settings.name, *self.engine.adapters

    def model_of(self, name: str | None) -> str:
        """One of `models`; the first for None.

        Raises:
          Problem: 404.
        """
        if name and name not in self.models:
            text = f"there is no model {name!r:.200}; this server has {', '.join(map(repr, self.models))}"
            raise Problem(text, 404, code="model_not_found", param="model")
        return name or self.settings.name

    def begin(
        self,
        prompts: Sequence[Prompt],
        asked: Asked,
        scored: bool = False,
        constraints: Sequence[Constraint | None] = (),
        model: str | None = None,
    ) -> list[Stream]:
        """A stream for each choice of each prompt, all or none, of one of `models`.

        Raises:
          AwqError: see `Engine.submit`.
        """
        if self.draining:
            raise Problem("the server is about to end", 503, "server_error", "unavailable")
        streams: list[Stream] = []
        try:
            for prompt in prompts:
                for choice in range(asked.choices):
                    own = constraints[len(streams)] if constraints else None
                    given: dict[str, object] = {"max_new_tokens": asked.most, "scored": scored, "constraint": own}
                    given["ignore_eos"] = asked.ignore_eos
                    given["adapter"] = None if model == self.settings.name else model
                    streams.append(self.engine.submit(prompt, asked.of_choice(choice), **given))  # type: ignore[arg-type]
        except Exception:
            for stream in streams:
                stream.cancel()
            raise
        return streams

    @contextlib.asynccontextmanager
    async def watching(self, http: HttpRequest, streams: Sequence[Stream]) -> AsyncIterator[None]:
        """Give the slots back when the client is gone, when the time is up, or when the block is left.

        Raises:
          TimeoutError: the time is up.
        """

        async def until_gone() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass
            for stream in streams:
                stream.cancel()

        watcher = asyncio.create_task(until_gone())
        try:
            async with asyncio.timeout(self.settings.timeout):
                yield
        finally:
            watcher.cancel()
            for stream in streams:
                if stream.request.finish_reason is None:
                    stream.cancel()


async def merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of several answers as they come, with the number of each."""
    if len(streams) == 1:
        async for one in streams[0]:
            yield 0, one
        return
    queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

    async def pump(number: int, stream: Stream) -> None:
        try:
            async for piece in stream:
                queue.put_nowait((number, piece))
        except Exception as e:  # told to the one who reads
            queue.put_nowait((number, e))

    pumps = [asyncio.create_task(pump(i, s)) for i, s in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            number, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece.finish_reason is not None
            yield number, piece
    finally:
        for task in pumps:
            task.cancel()


def problem_of(error: Exception) -> Problem:
    """What to tell a client; what is nobody's fault but ours is logged."""
    problem = of(error)
    if problem.status == 500:
        log.error("a request failed", exc_info=error)
    return problem
