"""One setting for each of several units, so that what all lose together is small and their bits are within a budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Choices(NamedTuple):
    """What one unit may be.

    Attributes:
      bits: float64 ``[C]``: of storage, by choice.
      losses: float64 ``[C]``.
    """

    bits: np.ndarray
    losses: np.ndarray


class _Step(NamedTuple):
    slope: float  # of the loss, per bit; below 0
    unit: int
    before: int
    after: int
    bits: float


def choose(units: Sequence[Choices], budget: float) -> list[int]:
    """The choice of each unit.

    A knapsack with several choices for each thing. Along the lower convex hull of a unit's choices each further bit
    helps less than the one before; taking the steps of all units in the order of what they gain per bit is best for
    every budget that it reaches exactly (Sinha and Zoltners, "The multiple-choice knapsack problem", 1979). What is
    left at the end goes to the steps that still fit.

    Args:
      units: at least one choice each.
      budget: bits of all units together.

    Returns:
      Index of the choice of each; the smallest ones if even those are more than the budget.
    """
    at, steps = [], []
    for i, unit in enumerate(units):
        hull = _hull(unit)
        at.append(hull[0])
        for a, b in itertools.pairwise(hull):
            more = unit.bits[b] - unit.bits[a]
            steps.append(_Step((unit.losses[b] - unit.losses[a]) / more, i, a, b, more))
    left = budget - sum(unit.bits[c] for unit, c in zip(units, at, strict=True))
    for step in sorted(steps):
        if step.before == at[step.unit] and step.bits <= left:  # a step that does not fit bars the unit's later ones
            at[step.unit] = step.after
            left -= step.bits
    return at


def _hull(unit: Choices) -> list[int]:
    """Choices on the lower convex hull, from the fewest bits on."""
    order = sorted(range(len(unit.bits)), key=lambda c: (unit.bits[c], unit.losses[c]))
    hull: list[int] = []
    for c in order:
        if hull and unit.losses[c] >= unit.losses[hull[-1]]:
            continue  # more bits for nothing
        while len(hull) > 1 and _slope(unit, hull[-2], hull[-1]) >= _slope(unit, hull[-1], c):
            hull.pop()
        hull.append(c)
    return hull


def _slope(unit: Choices, a: int, b: int) -> float:
    return float((unit.losses[b] - unit.losses[a]) / (unit.bits[b] - unit.bits[a]))
