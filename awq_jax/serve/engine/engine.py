"""The engine: a thread that reads prompts piece by piece and writes all answers at once, step by step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np

from awq_jax.convert.text import Message
from awq_jax.errors import BusyError, ConfigError, ContextLengthError, EngineError, ShapeError
from awq_jax.models.vision.config import Gemma3Vision
from awq_jax.serve import prompts
from awq_jax.serve.answer import rows_of
from awq_jax.serve.engine import drawing, sizes
from awq_jax.serve.engine import slots as slot_cache
from awq_jax.serve.engine.explaining import explain
from awq_jax.serve.engine.looking import Prompt
from awq_jax.serve.engine.programs import Programs, row_of
from awq_jax.serve.engine.request import Constraint, Request, Tell
from awq_jax.serve.engine.scheduler import Scheduler
from awq_jax.serve.engine.stream import Stream
from awq_jax.serve.engine.turns import Turns
from awq_jax.serve.engine.watch import Watch
from awq_jax.serve.generate import check_prompt
from awq_jax.serve.sampling import Sampling

if TYPE_CHECKING:
    from awq_jax.serve.model import Model

log = logging.getLogger(__name__)

NEAR_TIE = 2e-4  # in float32 an engine's token is the model's best, or less likely by fewer nats than these


class Engine:
    """Continuous batching: requests enter and leave a fixed number of slots between the steps of a model.

    A request's answer does not depend on what runs beside it, but for the order in which a device sums: greedy answers
    are those of `Model.generate` unless two tokens are nearly equally likely, in float32 to within `NEAR_TIE` nats.

    Args:
      model: what `awq_jax.load` returns; with an adapter, it is used for every request, and of several, by name,
        each request has one or none. While the engine runs, its weights stay in memory in the form in which they are
        served.
      slots: requests at once.
      length: tokens of one, prompt and answer; None: as many as the model reads and half of the free memory holds, at
        most 8192.
      chunk: tokens of prompts that are read between two steps of the others.
      kv_bits: 8 keeps keys and values in 8 bits; None as the model makes them.
      queue: requests that may wait for a slot.
      reuse: prompts that begin alike share what was read, as long as a slot holds it.
      image_tokens: of one image at most, for models that take images of any size.
      watch: is told what happens (see `awq_jax.serve.engine.watch.Watch`).
      told: called with programs compiled, and how many there are, while the engine warms up.

    Raises:
      ConfigError: on a size out of range, or where there is no memory for the cache.

    Attributes:
      model: as given.
      sizes: of the cache, see `awq_jax.serve.engine.sizes.Sizes`.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 16,
        length: int | None = None,
        chunk: int = 256,
        kv_bits: int | None = None,
        queue: int = 256,
        reuse: bool = True,
        image_tokens: int = 1024,
        watch: Watch | None = None,
        told: Callable[[int, int], object] = lambda done, of: None,
    ):
        for name, value in (("slots", slots), ("length", length), ("chunk", chunk), ("image_tokens", image_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1; got {value}")
        if kv_bits not in (None, 8):
            raise ConfigError(f"kv_bits is 8, or None for keys and values as the model makes them; got {kv_bits}")
        if queue < 0:
            raise ConfigError(f"queue must be 0 or more; got {queue}")
        self.model, self.queue, self.watch = model, queue, watch or Watch()
        self.ends = model.eos_ids()
        generator, params, adapters = model.serving()
        config = generator.config
        if length is not None and length > config.max_length:
            raise ConfigError(f"length is {length}; the model's context is {config.max_length}")
        if isinstance(config.vision, Gemma3Vision):  # an image is read in one piece
            chunk = max(chunk, config.vision.side**2)
        row = row_of(generator, params)
        device = next(iter(jax.tree.leaves(params)[0].devices()))
        if length is None:
            length = _longest(row, config.max_length, slots, chunk, kv_bits, device)
        whole = any(layer.rope is not None and layer.rope.kind in ("dynamic", "longrope") for layer in config.layers)
        self.sizes = sizes.Sizes.of(slots, length, chunk, whole)
        self.programs = Programs(generator, params, self.sizes, kv_bits, image_tokens, adapters)
        keeps = all(slot_cache.is_store(layer) for layer in self.programs.shapes.layers)
        self.scheduler = Scheduler(self.sizes, reuse and keeps)
        beyond = min(
            (r.original_length for layer in config.layers if (r := layer.rope) and r.kind in ("dynamic", "longrope")),
            default=length,
        )
        self._lock = threading.Condition()
        self._inbox: list[Request] = []
        self._stopping = self._stopped = False
        self._thread: threading.Thread | None = None
        self.programs.warm_up(told)
        self.turns = Turns(self.programs, self.scheduler, self.watch, beyond)

    def explain(self) -> str:
        """What runs: weights, cache and sizes, one fact a line."""
        return explain(self.model, self.programs, self.scheduler.reuse)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of those of which a request may have one."""
        return self.programs.adapters

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return slot_cache.nbytes(self.programs.shapes)

    # What callers do, in any thread.

    def submit(
        self,
        prompt: str | Sequence[int] | Sequence[Message] | Mapping[str, Any] | Prompt,
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int | None = None,
        chat: bool = False,
        scored: bool = False,
        constraint: Constraint | None = None,
        ignore_eos: bool = False,
        adapter: str | None = None,
    ) -> Stream:
        """Continue one prompt. To be called in a running event loop.

        Args:
          prompt: a text, token ids, or, with ``chat``, a conversation or a user's message; or what a processor
            returned for one text and its images (see `awq_jax.serve.model.Model.inputs`).
          sampling: how tokens are picked; None: greedy.
          max_new_tokens: at most; None: until the slot is full. 0 only reads the prompt.
          chat: wrap the prompt in the tokenizer's chat template.
          scored: report log probabilities of the prompt's tokens.
          constraint: what the answer may say.
          ignore_eos: do not end where the model would.
          adapter: the name of one of `adapters`; None for none of these.

        Returns:
          An async iterator of `Piece`. One that is dropped, or closed, gives its slot back.

        Raises:
          BusyError: the queue is full.
          ShapeError: the prompt is empty, or has ids outside of the vocabulary; images do not fit the model, or the
            prompt's tokens.
          ContextLengthError: it does not fit with its answer.
          ConfigError: ``sampling`` does not fit the vocabulary, there is no tokenizer, or no adapter of that name.
          EngineError: the engine is stopped.
        """
        given = prompt if isinstance(prompt, Prompt) else self.prepared(prompt, chat)
        most = self.room(given.ids, max_new_tokens)
        if adapter is not None and adapter not in self.adapters:
            known = ", ".join(map(repr, self.adapters)) or "none"
            raise ConfigError(f"there is no adapter {adapter!r}; a request can have {known}")
        place = -1 if adapter is None else self.adapters.index(adapter)

        def request(tell: Tell) -> Request:
            chosen = sampling or Sampling()
            ends = () if ignore_eos else self.ends
            return Request(given, chosen, most, ends, self.model.tokenizer, tell, scored, constraint, place)

        return Stream(request, self.put, self.cancel)

    def prepared(
        self, prompt: str | Sequence[int] | Sequence[Message] | Mapping[str, Any], chat: bool = False
    ) -> Prompt:
        """A prompt as `submit` takes it, too: what can be done before, in any thread.

        Raises:
          ConfigError, ShapeError: see `submit`.
        """
        config, tokenizer = self.programs.config, self.model.tokenizer
        images: Mapping[str, np.ndarray] | None = None
        if isinstance(prompt, Mapping):
            rows, images = rows_of(config, tokenizer, prompt, chat)
            if len(rows) != 1:
                raise ShapeError(f"input_ids has {len(rows)} rows; a request is one prompt: submit each by itself")
        elif chat or isinstance(prompt, str):
            rows = prompts.encode(tokenizer, cast("str | Sequence[Message]", prompt), chat)
        else:
            rows = [cast("list[int]", prompt)]
        ids = [int(i) for i in rows[0]]
        return Prompt(ids, self.programs.looked_at(ids, images or {}))

    def room(self, prompt: Sequence[int], max_new_tokens: int | None) -> int:
        """How many new tokens a prompt may have.

        Raises:
          ContextLengthError, ShapeError: see `submit`.
        """
        room = self.sizes.length - len(prompt)
        wanted = room if max_new_tokens is None else max_new_tokens
        if wanted > room or room < 1:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens and {max(wanted, 1)} are asked for; there is room for "
                f"{self.sizes.length} in all: shorten it, or ask for fewer"
            )
        check_prompt(self.programs.config, prompt, "the prompt")
        return wanted

    def put(self, request: Request) -> None:
        """Queue a request.

        Raises:
          BusyError, ConfigError, EngineError: see `submit`.
        """
        drawing.check(request.sampling, self.programs.vocabulary)
        with self._lock:
            if self._stopping:
                raise EngineError("the engine is stopped; make a new one")
            self.check_queue()
            self._inbox.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="awq-jax-engine", daemon=True)
                self._thread.start()
            self._lock.notify()

    def check_queue(self) -> None:
        """Nothing if there is room for one more request now.

        Raises:
          BusyError: the queue is full.
        """
        waiting = len(self._inbox) + len(self.scheduler.waiting)
        free = self.sizes.slots - len(self.scheduler.taken)
        if waiting >= self.queue + max(free, 0):
            raise BusyError(f"{waiting} requests wait already; try again later")

    def cancel(self, request: Request) -> None:
        """End a request at the next step; nothing if it is over."""
        request.cancelled = True
        with self._lock:
            self._lock.notify()

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return not self._stopping

    @property
    def used(self) -> float:
        """The share of the cache's tokens that requests at work have."""
        return sum(len(s.ids) for s in self.scheduler.taken) / (self.sizes.slots * self.sizes.length)

    @property
    def speed(self) -> float:
        """Tokens a second, over the last steps; 0 if there was none for a second."""
        return self.turns.speed

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run and that wait."""
        return len(self.scheduler.taken), len(self.scheduler.waiting) + len(self._inbox)

    def stop(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests; finish those that are there, or, without ``drain``, end them with an error.

        Args:
          timeout: seconds after which those that are left are ended as without ``drain``.
        """
        with self._lock:
            self._stopping = True
            self._stopped = self._stopped or not drain
            self._lock.notify()
        if self._thread is None:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._stopped = True
            self._thread.join()

    # What the engine's thread does.

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._inbox or self.scheduler.taken or self.scheduler.waiting or self._stopping):
                    self._lock.wait()
                arrived, self._inbox = self._inbox, []
            self.scheduler.waiting.extend(arrived)
            self.turns.drop_cancelled()
            if self._stopped or (self._stopping and not (self.scheduler.taken or self.scheduler.waiting)):
                break
            try:
                self.turns.run()
                self.watch.turn(*self.load)
            except Exception as e:  # whatever it is, nobody may wait forever
                log.exception("a step failed; the requests in it are ended")
                self._fail(EngineError(f"a step of the engine failed: {type(e).__name__}: {e}"), everyone=False)
                self.turns.clear()
        self._fail(EngineError("the engine was stopped"), everyone=True)

    def _fail(self, error: EngineError, everyone: bool) -> None:
        """End requests in slots, or all, with an error."""
        with self._lock:
            arrived, self._inbox = (self._inbox, []) if everyone else ([], self._inbox)
        waiting = [*self.scheduler.waiting, *arrived] if everyone else []
        for slot in self.scheduler.taken:
            owner = slot.owner
            self.scheduler.release(slot)
            if owner is not None:
                owner.tell(error)
                self.watch.failed(owner)
        for request in waiting:
            request.tell(error)
            self.watch.failed(request)
        if everyone:
            self.scheduler.waiting.clear()


def _longest(row: object, most: int, count: int, chunk: int, kv_bits: int | None, device: jax.Device) -> int:
    """Tokens of a slot; see `awq_jax.serve.engine.sizes.longest`."""
    one, two = (slot_cache.nbytes(jax.eval_shape(lambda n=n: slot_cache.empty(row, 1, n, kv_bits))) for n in (1, 2))  # type: ignore
    return sizes.longest(count, two - one, 2 * one - two, most, chunk, device)
