"""The Grams of one scale group, whether all of them are in memory (here) or some at a time (`expert_grams`)."""

import functools
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax import dtypes
from awq_jax.devices import host
from awq_jax.pack import Array
from awq_jax.plan.plan import ScaleGroup


class Grams(Protocol):
    """Sums of ``x^T x`` over tokens, one for each instance: expert ``e`` of scanned layer ``l`` is ``l * E + e``."""

    def collect(self, instance: int) -> jax.Array:
        """Float32 ``[K, K]`` of one instance. Ask in rising order: going back may cost a pass over all batches."""

    def sum_experts(self, layer: int) -> jax.Array:
        """Float32 ``[K, K]``: the sum over the experts of a layer."""

    def all_finite(self) -> bool:
        """Whether there is neither NaN nor inf in any."""


class ArrayGrams:
    """`Grams` that are one array.

    Args:
      gram: ``[*scan, *batch, K, K]``.
      group: whose.
    """

    def __init__(self, gram: Array, group: ScaleGroup) -> None:
        self._gram, self._lead, self._experts = gram, (*group.scan, *group.batch), math.prod(group.batch)
        self._summed: dict[int, jax.Array] = {}  # of the last layer asked for

    def collect(self, instance: int) -> jax.Array:
        """See `Grams`."""
        if not self._lead:
            return jax.device_put(self._gram)
        here = host.view(self._gram)
        return jax.device_put((self._gram if here is None else here)[np.unravel_index(instance, self._lead)])

    def sum_experts(self, layer: int) -> jax.Array:
        """See `Grams`."""
        if layer not in self._summed:
            self._summed.clear()
            first = layer * self._experts
            self._summed[layer] = functools.reduce(jnp.add, (self.collect(first + e) for e in range(self._experts)))
        return self._summed[layer]

    def all_finite(self) -> bool:
        """See `Grams`."""
        return all_finite(self._gram)


def all_finite(x: Array) -> bool:
    """Whether there is neither NaN nor inf in ``x``."""
    here = host.view(x)
    return bool(_all_finite(x)) if here is None else dtypes.all_finite(here)


@jax.jit
def _all_finite(x: Array) -> jax.Array:
    return jnp.isfinite(x).all()
