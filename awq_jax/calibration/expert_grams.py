"""Grams of more experts than fit into memory: some at a time, collected when they are asked for."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from awq_jax.calibration.calibration import Stats
from awq_jax.calibration.grams import Grams, all_finite
from awq_jax.pack import Array
from awq_jax.plan.plan import ScaleGroup

BUDGET = 2 << 30  # bytes of the Grams of one group


def at_a_time(group: ScaleGroup) -> int | None:
    """How many experts' Grams of ``group`` fit into ``BUDGET``, a divisor of their number; None for all."""
    experts, one = math.prod(group.batch), 4 * group.channels**2
    if group.scan or experts == 1 or experts * one <= BUDGET:
        return None
    return max(n for n in range(1, experts + 1) if experts % n == 0 and (n == 1 or n * one <= BUDGET))


class ExpertGrams:
    """`awq_jax.calibration.grams.Grams` of a group's experts, of which only some are in memory.

    Args:
      layer: their sum, ``[K, K]``.
      size: how many are in memory at a time.
      collect: sends the calibration set through the block for the Grams ``[size, K, K]`` of the experts from a
        number on.
    """

    def __init__(self, layer: Array, size: int, collect: Callable[[int], Array]) -> None:
        self._layer, self._size, self._collect = layer, size, collect
        self._start = -1
        self._held: Array | None = None

    def collect(self, instance: int) -> jax.Array:
        """``[K, K]`` of one expert; another pass over all batches unless it is among those in memory."""
        start = instance // self._size * self._size
        if start != self._start:
            self._held = None  # before the next are made
            self._start, self._held = start, self._collect(start)
        assert self._held is not None
        return jnp.asarray(self._held[instance - start])

    def sum_experts(self, layer: int) -> jax.Array:
        """``[K, K]``: the sum over all experts, of the only layer there is."""
        return jnp.asarray(self._layer)

    def all_finite(self) -> bool:
        """Whether there is neither NaN nor inf in any."""
        return all_finite(self._layer)


@dataclasses.dataclass(frozen=True)
class ExpertStats(Stats):
    """`Stats` with the Grams of only some experts in memory; ``gram`` is their sum ``[K, K]``.

    Attributes:
      expert_grams: of all experts.
    """

    expert_grams: ExpertGrams

    def grams(self, group: ScaleGroup) -> Grams:
        """Those of all experts."""
        return self.expert_grams
