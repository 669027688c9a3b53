"""One request: what it asks for, what it has become, and the pieces that it is told."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np

from awq_jax.convert.text import TokenizerLike
from awq_jax.serve.detokenize import Detokenizer
from awq_jax.serve.engine.looking import Prompt
from awq_jax.serve.generate import TokenLogprobs
from awq_jax.serve.sampling import Sampling

Finish = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one step adds to an answer.

    Attributes:
      text: in whole characters; "" where a token completes none.
      token: the new token; None for the last piece of an answer that ended with a token that is no part of it.
      logprobs: of ``token``, if they were asked for.
      finish_reason: None while there is more: ``"stop"``, ``"length"``, or ``"cancelled"``.
    """

    text: str
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    finish_reason: Finish | None = None


class Constraint(Protocol):
    """What an answer may say next, as a grammar or a schema has it."""

    def allowed(self) -> np.ndarray:
        """uint8 ``[V / 8]``: a bit for each token, lowest first; an error here ends the answer, and no other."""

    def accept(self, token: int) -> None:
        """The answer goes on with this token, which was allowed. Does not fail."""


@dataclasses.dataclass
class Times:
    """When what happened, in seconds of `time.perf_counter`; 0 for not yet. ``gap``: between the last two tokens."""

    submitted: float = dataclasses.field(default_factory=time.perf_counter)
    started: float = 0.0
    first: float = 0.0
    last: float = 0.0
    gap: float = 0.0


Tell = Callable[[Piece | Exception], object]
"""Called in the engine's thread with each piece, or with the error that ended the answer."""


class Request:
    """A prompt to be continued.

    Args:
      prompt: token ids, and the images that they stand for.
      sampling: how its tokens are picked.
      most: new tokens, at most; 0 only to read the prompt.
      ends: ids that end the answer; no part of it.
      tokenizer: makes text of ids; None for no text.
      tell: hears of each `Piece`.
      scored: report log probabilities of the prompt's tokens.
      constraint: what may be said.
      adapter: its place in `awq_jax.serve.engine.programs.Programs.adapters`; -1 for none.

    Attributes:
      prompt, pictures: as given.
      keys: the prompt, as two prompts are compared: tokens of images differ with the images.
      ids: the new tokens.
      made: tokens that the model has made, the one that ended the answer included.
      reused: tokens of the prompt that were in the cache.
      prompt_logprobs: of each token of the prompt but the first, if ``scored``.
      finish_reason: None while it runs.
    """

    def __init__(
        self,
        prompt: Prompt,
        sampling: Sampling,
        most: int,
        ends: Sequence[int],
        tokenizer: TokenizerLike | None,
        tell: Tell,
        scored: bool = False,
        constraint: Constraint | None = None,
        adapter: int = -1,
    ):
        self.prompt, self.sampling, self.most = list(prompt.ids), sampling, most
        self.ends, self.tell, self.scored, self.constraint = {*ends, *sampling.stop_ids}, tell, scored, constraint
        self.pictures, self.adapter = prompt.pictures, adapter
        self.keys = self.prompt if self.pictures is None else self.pictures.keys
        self.text = None if tokenizer is None else Detokenizer(tokenizer, self.prompt, sampling.stop)
        self.ids: list[int] = []
        self.made = self.reused = 0
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.finish_reason: Finish | None = None
        self.cancelled = False
        self.times = Times()

    def push(self, token: int, logprobs: TokenLogprobs | None) -> Piece:
        """A token was drawn; what there is to tell of it."""
        self.made += 1
        now = time.perf_counter()
        self.times.gap, self.times.last = now - self.times.last, now
        self.times.first = self.times.first or now
        if token in self.ends:
            return self.finished("stop")
        self.ids.append(token)
        text = "" if self.text is None else self.text.push(token)
        stopped = self.text is not None and self.text.stopped
        if stopped or self.made >= self.most:
            return self.finished("stop" if stopped else "length", text, token, logprobs)
        return Piece(text, token, logprobs)

    def finished(
        self, why: Finish, text: str = "", token: int | None = None, logprobs: TokenLogprobs | None = None
    ) -> Piece:
        """It is over; the last that there is to tell."""
        if self.text is not None:
            text += self.text.finish()
            why = "stop" if self.text.stopped and why == "length" else why
        self.finish_reason = why
        return Piece(text, token, logprobs, why)
