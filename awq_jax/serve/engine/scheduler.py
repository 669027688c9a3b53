"""Which request is in which slot, and what of its prompt is there already. No arrays of the device here."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence

from awq_jax.serve.engine.request import Request
from awq_jax.serve.engine.sizes import Sizes

WORTH = 16  # tokens that have to be in common for a slot's content to be copied


@dataclasses.dataclass(eq=False)
class Slot:
    """One row of the cache.

    Attributes:
      number: which.
      ids: tokens that it holds, those of its last owner until a new one comes.
      adapter: with which they were read, see `Request`.
      owner: the request in it.
      read: tokens of the owner's prompt that are in the cache.
      used: when it last had an owner, by a counter.
    """

    number: int
    ids: list[int] = dataclasses.field(default_factory=list)
    adapter: int = -1
    owner: Request | None = None
    read: int = 0
    used: int = 0


@dataclasses.dataclass(frozen=True)
class Reuse:
    """Tokens of a prompt that are in the cache: the first ``tokens`` of slot ``source``."""

    source: int
    tokens: int


class Scheduler:
    """First come, first served; a freed slot keeps what it holds until it is needed, and the one that was not used for
    longest goes first.

    Args:
      sizes: of the cache.
      reuse: whether what slots hold can be shared by prompts that begin alike.

    Attributes:
      waiting: requests without a slot.
      reading: slots whose prompt is being read, in order.
      writing: slots whose answer is being written.
    """

    def __init__(self, sizes: Sizes, reuse: bool):
        self.sizes, self.reuse = sizes, reuse
        self.slots = [Slot(i) for i in range(sizes.slots)]
        self.waiting: collections.deque[Request] = collections.deque()
        self.reading: list[Slot] = []
        self.writing: list[Slot] = []
        self._clock = itertools.count(1)

    @property
    def taken(self) -> list[Slot]:
        """Slots with an owner."""
        return [s for s in self.slots if s.owner is not None]

    def admit(self) -> list[Slot]:
        """Give free slots to those that wait."""
        new = []
        while self.waiting and (free := [s for s in self.slots if s.owner is None]):
            request = self.waiting.popleft()
            slot = self._best(free, request)
            slot.owner, slot.read = request, 0
            self.reading.append(slot)
            new.append(slot)
        return new

    def release(self, slot: Slot) -> None:
        """Its owner is done."""
        slot.owner, slot.used = None, next(self._clock)
        for group in (self.reading, self.writing):
            if slot in group:
                group.remove(slot)

    def forget(self) -> None:
        """What all slots held is lost."""
        for slot in self.slots:
            slot.ids, slot.read = [], 0

    def found(self, slot: Slot) -> Reuse | None:
        """What of the owner's prompt is in the cache, if that is worth anything; asked when its reading begins."""
        request = slot.owner
        assert request is not None
        if not self.reuse or request.scored:
            return None
        best = max(self.slots, key=lambda s: (self._common(s, request), s is slot))
        tokens = self._common(best, request)
        if best is not slot and tokens - self._common(slot, request) < WORTH:
            best, tokens = slot, self._common(slot, request)
        return Reuse(best.number, tokens) if tokens else None

    def _best(self, free: Sequence[Slot], request: Request) -> Slot:
        """The slot that holds most of the prompt; else the one for which steps stay narrow, unused for longest."""
        if self.reuse and not request.scored:
            most = max(free, key=lambda s: self._common(s, request))
            if self._common(most, request) >= WORTH:
                return most
        taken = [s.number for s in self.taken]
        return min(free, key=lambda s: (self.sizes.window([*taken, s.number])[1], s.used, s.number))

    def _common(self, slot: Slot, request: Request) -> int:
        """Tokens at the beginning that a slot and a prompt have in common; the last is always read anew."""
        most = min(len(slot.ids), len(request.prompt) - 1) if slot.adapter == request.adapter else 0
        return next((i for i in range(most) if slot.ids[i] != request.keys[i]), most)
