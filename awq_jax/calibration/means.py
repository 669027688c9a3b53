"""Means of one group from its calibration sums, with what to do where tokens are missing."""

import dataclasses
import math

import jax
import numpy as np

from awq_jax.calibration.calibration import Stats
from awq_jax.calibration.grams import Grams
from awq_jax.plan.plan import ScaleGroup

MIN_TOKENS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Means:
    """Statistics per instance: S scanned layers, E experts (or 1).

    Attributes:
      absmean: float32 ``[S, E, K]``, ``E|x|``.
      note: what a user should know about them, "" if nothing.
    """

    absmean: np.ndarray
    note: str
    _grams: Grams
    _count: np.ndarray  # [S, E]
    _few: np.ndarray  # [S, E]: too few tokens to be trusted

    def collect_gram(self, layer: int, expert: int) -> tuple[jax.Array, np.float32]:
        """The sum of ``x^T x`` of one instance, float32 ``[K, K]``, and of how many tokens; see `Grams.collect`."""
        few = self._few[layer, expert]
        instance = layer * self._count.shape[1] + expert
        total = self._grams.sum_experts(layer) if few else self._grams.collect(instance)
        return total, np.float32(self._count[layer, expert])


def means_of(group: ScaleGroup, stats: Stats) -> Means | None:
    """Means of ``stats``; None if a layer saw no finite activation at all.

    Experts that saw fewer than ``MIN_TOKENS`` tokens take the statistics of their layer.
    """
    s, e, k = math.prod(group.scan), math.prod(group.batch), group.channels
    total = np.asarray(stats.abs).reshape(s, e, k)
    count = np.asarray(stats.count).reshape(s, e)
    dropped = float(np.asarray(stats.dropped).sum())
    grams = stats.grams(group)
    if (count.sum(axis=1) == 0).any() or not grams.all_finite():
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
    return Means(total / count[..., None], "; ".join(notes), grams, count, few)
