"""Grams of more experts than fit into memory: some at a time, collected when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax

from awq_jax.plan.plan import Group

BUDGET = 2 << 30  # bytes of the Grams of one group


def at_a_time(group: Group) -> int | None:
    """How many experts' Grams of ``group`` fit into ``BUDGET``, a divisor of their number; None for all."""
    experts, one = math.prod(group.batch), 4 * group.channels**2
    if group.scan or experts == 1 or experts * one <= BUDGET:
        return None
    return max(n for n in range(1, experts + 1) if experts % n == 0 and (n == 1 or n * one <= BUDGET))


class ExpertGrams:
    """Stands for the Grams ``[E, K, K]`` of a group's experts, in `awq_jax.calibration.calibration.Stats`.

    Args:
      layer: their sum, ``[K, K]``.
      size: how many are in memory at a time.
      collect: sends the calibration set through the block for the Grams ``[size, K, K]`` of the experts from a
        number on.
    """

    def __init__(self, layer: jax.Array, size: int, collect: Callable[[int], jax.Array]) -> None:
        self.layer, self._size, self._collect = layer, size, collect
        self._start = -1
        self._held: jax.Array | None = None

    def one(self, expert: int) -> jax.Array:
        """``[K, K]``. Ask in rising order: going back costs another pass."""
        start = expert // self._size * self._size
        if start != self._start:
            self._held = None  # before the next are made
            self._start, self._held = start, self._collect(start)
        assert self._held is not None
        return self._held[expert - start]
