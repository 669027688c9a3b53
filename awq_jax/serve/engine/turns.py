"""What an engine does in a turn: a piece of a prompt, then the next token of every answer."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence

import jax
import numpy as np

from awq_jax.errors import AwqError, EngineError
from awq_jax.serve.engine import drawing, sizes
from awq_jax.serve.engine.looking import Pictures
from awq_jax.serve.engine.programs import Programs, Scores
from awq_jax.serve.engine.request import Piece, Request
from awq_jax.serve.engine.scheduler import Scheduler, Slot
from awq_jax.serve.engine.watch import Watch
from awq_jax.serve.generate import TokenLogprobs, token_logprobs


class Turns:
    """The cache on the device, and the requests that are in it. Everything here is called by one thread.

    Args:
      programs: compiled for the cache.
      scheduler: has the slots.
      watch: is told of the work.
      whole_beyond: a prompt of more tokens has to be read in one piece, and shares nothing.
    """

    def __init__(self, programs: Programs, scheduler: Scheduler, watch: Watch, whole_beyond: int):
        self.programs, self.scheduler, self.watch, self._whole_beyond = programs, scheduler, watch, whole_beyond
        self.sizes = programs.sizes
        self.settings = drawing.Settings(self.sizes.slots, programs.vocabulary)
        self._tokens = np.zeros(self.sizes.slots, np.int32)
        # What a piece of a text has of images, by its width.
        self._nothing = {width: programs.nothing(width) for width in self.sizes.chunks}
        self._steps: collections.deque[tuple[float, int]] = collections.deque(maxlen=32)  # when, and how many tokens
        self.clear()

    def clear(self) -> None:
        """Begin with an empty cache."""
        self.scheduler.forget()
        self.cache, self.seen = self.programs("cache"), self.programs("seen")

    def run(self) -> None:
        """Read a piece of a prompt, then one step of all that write."""
        self.scheduler.admit()
        budget = self.sizes.chunk
        while self.scheduler.reading and budget > 0:
            budget -= self.read(self.scheduler.reading[0])
        if self.scheduler.writing:
            self.step()

    def drop_cancelled(self) -> None:
        """End what nobody waits for any more."""
        for request in [r for r in self.scheduler.waiting if r.cancelled]:
            self.scheduler.waiting.remove(request)
            request.tell(request.finished("cancelled"))
            self.watch.finished(request)
        for slot in self.scheduler.taken:
            if (owner := slot.owner) is not None and owner.cancelled:
                self._finished(slot, owner, owner.finished("cancelled"))

    def read(self, slot: Slot) -> int:
        """A piece of the prompt in a slot; how many tokens that were."""
        request, number = slot.owner, np.int32(slot.number)
        assert request is not None
        if not slot.read and not request.times.started:
            self._begin(slot, request)
        start, pictures = slot.read, request.pictures
        if pictures is not None and (image := pictures.unseen(start)) is not None:
            return self._look(pictures, image)
        length = len(request.prompt) - start
        if len(request.prompt) <= self._whole_beyond:  # else angles depend on the length of the whole
            length = min(length, self.sizes.chunk, self.sizes.chunks[-1])
        if pictures is not None:
            length = pictures.whole(start, start + length) - start
        width = sizes.fitting(self.sizes.chunks, length)
        tokens = np.zeros(width, np.int32)
        tokens[:length] = request.prompt[start : start + length]
        looked = self._nothing[width] if pictures is None else pictures.piece(start, length, width)
        read = sizes.fitting(self.sizes.reads, start + width)
        begun = time.perf_counter()
        hidden, self.cache = self.programs(
            "read", self.programs.params, self.cache, number, tokens, np.int32(start), np.int32(length), looked,
            self.programs.row([request.adapter]), read=read,
        )  # fmt: skip
        slot.read += length
        slot.ids = request.keys[: slot.read]
        if request.scored:
            self._score(request, hidden, start, length)
        hidden.block_until_ready()  # so that the time that is counted is that of this work
        self.watch.read(length, time.perf_counter() - begun)
        if slot.read == len(request.prompt):
            self.scheduler.reading.remove(slot)
            self._first(slot, request, hidden, length - 1)
        return width

    def _look(self, pictures: Pictures, number: int) -> int:
        """Look at an image; as many tokens as there are in a turn, since that takes as long, or longer."""
        begun = time.perf_counter()
        found = self.programs("look", self.programs.params, pictures.arrays(number))
        pictures.put(number, jax.device_get(found))
        self.watch.looked(time.perf_counter() - begun)
        return self.sizes.chunk

    def _begin(self, slot: Slot, request: Request) -> None:
        request.times.started = time.perf_counter()
        if (reuse := self.scheduler.found(slot)) is not None and len(request.prompt) <= self._whole_beyond:
            tokens = reuse.tokens if request.pictures is None else request.pictures.whole(-1, reuse.tokens)
            if reuse.source != slot.number:
                self.cache = self.programs(
                    "copy", self.cache, np.int32(reuse.source), np.int32(slot.number),
                    length=sizes.fitting(self.sizes.reads, reuse.tokens),
                )  # fmt: skip
            slot.read = request.reused = tokens
        slot.ids, slot.adapter = request.keys[: slot.read], request.adapter
        self.settings.put(slot.number, request.sampling)
        self.watch.started(request)

    def _score(self, request: Request, hidden: jax.Array, start: int, length: int) -> None:
        following = request.prompt[start + 1 : start + length + 1]
        targets = np.zeros(hidden.shape[0], np.int32)
        targets[: len(following)] = following
        scores: Scores = jax.device_get(
            self.programs("score", self.programs.params, hidden, targets, self.programs.row([request.adapter]))
        )
        most = request.sampling.logprobs or 0
        for i, token in enumerate(following):
            likely = zip(scores.likely[i, :most].tolist(), scores.likely_logprobs[i, :most].tolist(), strict=True)
            request.prompt_logprobs.append(TokenLogprobs(token, float(scores.logprobs[i]), tuple(likely)))

    def _first(self, slot: Slot, request: Request, hidden: jax.Array, index: int) -> None:
        """The first new token of a prompt that was read."""
        if request.most == 0:
            return self._finished(slot, request, request.finished("length"))
        if self._kind([request]) == "all":  # not before: what others draw in between is counted for this slot as well
            bits = drawing.tokens_of(request.prompt, self.programs.vocabulary)
            self.seen = self.programs("begin", self.seen, np.int32(slot.number), bits)
        row = self.programs.row([request.adapter])
        logits = self.programs("head", self.programs.params, hidden, np.int32(index), row)
        self.scheduler.writing.append(slot)
        self._draw(logits, slot.number, 1, [slot])

    def step(self) -> None:
        """The next token of every answer."""
        begun = time.perf_counter()
        writing = self.scheduler.writing
        first, rows = self.sizes.window([s.number for s in writing])
        positions = np.full(self.sizes.slots, self.sizes.allocated, np.int32)
        adapters = [-1] * rows
        for slot in writing:
            positions[slot.number], adapters[slot.number - first] = len(slot.ids), slot.adapter
        read = sizes.fitting(self.sizes.reads, max(len(s.ids) for s in writing) + 1)
        cut = slice(first, first + rows)
        logits, self.cache = self.programs(
            "step", self.programs.params, self.cache, np.int32(first), self._tokens[cut].copy(), positions[cut],
            self.programs.row(adapters), rows=rows, read=read,
        )  # fmt: skip
        for slot in writing:
            slot.ids.append(int(self._tokens[slot.number]))
        self._draw(logits, first, rows, list(writing))
        self.watch.stepped(time.perf_counter() - begun)

    def _kind(self, requests: Sequence[Request]) -> drawing.Kind:
        kinds = {drawing.kind_of(r.sampling, r.constraint is not None) for r in requests}
        return next(kind for kind in reversed(drawing.KINDS) if kind in kinds)

    def _draw(self, logits: jax.Array, first: int, rows: int, drawing_slots: Sequence[Slot]) -> None:
        """Draw from ``logits`` of the ``rows`` slots from ``first``, and tell those that are named."""
        drawing_slots = [s for s in drawing_slots if self._may_go_on(s)]
        owners = [s.owner for s in drawing_slots if s.owner is not None]
        if not owners:
            return
        kind = self._kind(owners)
        given = self.settings.of(kind, first, rows, logits.shape[0])
        if kind == "all":
            window = np.int32(first), np.int32(rows)
            said, self.seen = self.programs("draw_seen", logits, self.seen, *window, given)
        else:
            said = self.programs("draw", logits, given)
        said = jax.device_get(said)
        for slot, request in zip(drawing_slots, owners, strict=True):
            row = slot.number - first
            token = int(said.ids[row])
            self._tokens[slot.number] = token
            self.settings.count(slot.number)
            if request.constraint is not None and token not in request.ends:
                request.constraint.accept(token)
            most = request.sampling.logprobs
            piece = request.push(token, None if most is None else token_logprobs(said, row, most))
            self.watch.wrote(request)
            if piece.finish_reason is not None:
                self._finished(slot, request, piece)
            else:
                request.tell(piece)
        self._steps.append((time.perf_counter(), len(owners)))

    def _may_go_on(self, slot: Slot) -> bool:
        """Whether anything may be said next; an answer whose constraint fails ends alone."""
        request = slot.owner
        if request is None or request.constraint is None:
            return request is not None
        try:
            self.settings.allowed[slot.number] = request.constraint.allowed()
        except Exception as e:
            self.scheduler.release(slot)
            self.watch.failed(request)
            request.tell(e if isinstance(e, AwqError) else EngineError(f"a constraint failed: {e}"))
            return False
        return True

    @property
    def speed(self) -> float:
        """Tokens a second, over the last steps; 0 if there was none for a second."""
        steps = list(self._steps)
        if len(steps) < 2 or time.perf_counter() - steps[-1][0] > 1:
            return 0.0
        return sum(n for _, n in steps[1:]) / max(steps[-1][0] - steps[0][0], 1e-9)

    def _finished(self, slot: Slot, request: Request, last: Piece) -> None:
        """The slot is free before anybody hears that it is."""
        self.scheduler.release(slot)
        self.watch.finished(request)
        request.tell(last)
