"""Means of one group from its calibration sums, with what to do where tokens are missing."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.calibration.calibration import Stats
from awq_jax.calibration.expert_grams import ExpertGrams
from awq_jax.plan.plan import Group

MIN_TOKENS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Statistics per instance: S scanned layers, E experts (or 1).

    Attributes:
      absmean: float32 ``[S, E, K]``, ``E|x|``.
      note: what a user should know about them, "" if nothing.
    """

    absmean: np.ndarray
    note: str
    _gram: Any  # [*scan, *batch, K, K] or `ExpertGrams`: sums
    _lead: tuple[int, ...]
    _count: np.ndarray  # [S, E]
    _few: np.ndarray  # [S, E]: too few tokens to be trusted
    _summed: dict[int, jax.Array] = dataclasses.field(default_factory=dict)  # of the last layer asked for

    def gram(self, layer: int, expert: int) -> tuple[jax.Array, np.float32]:
        """The sum of ``x^T x`` of one instance, float32 ``[K, K]``, and how many tokens it is of."""
        e = self._count.shape[1]
        few = self._few[layer, expert]
        total = self._layer(layer) if few else self._sum(layer * e + expert)
        return total, np.float32(self._count[layer, expert])

    def _layer(self, layer: int) -> jax.Array:
        if isinstance(self._gram, ExpertGrams):
            return self._gram.layer
        if layer not in self._summed:
            e = self._count.shape[1]
            self._summed.clear()
            self._summed[layer] = functools.reduce(jnp.add, (self._sum(layer * e + i) for i in range(e)))
        return self._summed[layer]

    def _sum(self, instance: int) -> jax.Array:
        if isinstance(self._gram, ExpertGrams):
            return self._gram.one(instance)
        return jnp.asarray(self._gram[np.unravel_index(instance, self._lead)] if self._lead else self._gram)


def moments(group: Group, stats: Stats) -> Moments | None:
    """Means of ``stats``; None if a layer saw no finite activation at all.

    Experts that saw fewer than ``MIN_TOKENS`` tokens take the statistics of their layer.
    """
    s, e, k = math.prod(group.scan), math.prod(group.batch), group.channels
    total = np.asarray(stats.abs).reshape(s, e, k)
    count = np.asarray(stats.count).reshape(s, e)
    dropped = float(np.asarray(stats.dropped).sum())
    whole = stats.gram.layer if isinstance(stats.gram, ExpertGrams) else stats.gram
    if (count.sum(axis=1) == 0).any() or not bool(all_finite(whole)):
        return None
    notes = []
    if dropped:
        notes.append(f"{dropped:.0f} tokens with NaN or inf activations were left out")
    few = count < MIN_TOKENS if e > 1 else np.zeros_like(count, bool)
    if few.any():
        rare = sorted(set(np.nonzero(few)[1].tolist()))
        notes.append(f"experts {rare} saw under {MIN_TOKENS} tokens: the layer's statistics were used")
        total = np.where(few[..., None], total.sum(axis=1, keepdims=True), total)
        count = np.where(few, count.sum(axis=1, keepdims=True), count)
    absmean = total / count[..., None]
    return Moments(absmean, "; ".join(notes), stats.gram, (*group.scan, *group.batch), count, few)


@jax.jit
def all_finite(x: jax.Array) -> jax.Array:
    """Whether there is neither NaN nor inf in ``x``."""
    return jnp.isfinite(x).all()
