"""Means of one group from its calibration sums, with what to do where tokens are missing."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.calibration import Stats
from awq_jax.plan import Group

MIN_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Moments:
    """Statistics per instance: S scanned layers, E experts (or 1).

    Attributes:
      gram: float32 ``[S, E, K, K]``, ``E[x^T x]``.
      absmean: float32 ``[S, E, K]``, ``E|x|``.
      note: what a user should know about them, "" if nothing.
    """

    gram: jax.Array
    absmean: jax.Array
    note: str = ""


def moments(group: Group, stats: Stats) -> Moments | None:
    """Means of ``stats``; None if a layer saw no finite activation at all.

    Experts that saw fewer than ``MIN_TOKENS`` tokens take the statistics of their layer.
    """
    s, e, k = math.prod(group.scan), math.prod(group.batch), group.channels
    gram = jnp.asarray(stats.gram).reshape(s, e, k, k)
    total = jnp.asarray(stats.abs).reshape(s, e, k)
    count = np.asarray(stats.count).reshape(s, e)
    dropped = float(np.asarray(stats.dropped).sum())
    if (count.sum(axis=1) == 0).any() or not bool(jnp.isfinite(gram).all()):
        return None
    notes = []
    if dropped:
        notes.append(f"{dropped:.0f} tokens with NaN or inf activations were left out")
    few = count < MIN_TOKENS
    if e > 1 and few.any():
        rare = sorted(set(np.nonzero(few)[1].tolist()))
        notes.append(f"experts {rare} saw under {MIN_TOKENS} tokens: the layer's statistics were used")
        pick = jnp.asarray(few)
        gram = jnp.where(pick[..., None, None], gram.sum(axis=1, keepdims=True), gram)
        total = jnp.where(pick[..., None], total.sum(axis=1, keepdims=True), total)
        count = np.where(few, count.sum(axis=1, keepdims=True), count)
    n = jnp.asarray(count)
    return Moments(gram / n[..., None, None], total / n[..., None], "; ".join(notes))
