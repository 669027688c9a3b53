"""Choosing within a budget, against all that could be chosen."""

import itertools

import numpy as np
import pytest

from awq_jax.budget.choose import Choices, choose


def units(seed: int, count: int = 5) -> list[Choices]:
    """Losses that fall by about a factor of four a bit, and not evenly."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, count)
    bits = np.array([2.0, 3.0, 4.0, 8.0])
    return [Choices(n * bits, n * rng.uniform(0.2, 5) * 4.0**-bits * rng.uniform(0.5, 2, 4)) for n in sizes]


def best(every: list[Choices], budget: float) -> float:
    picks = itertools.product(*(range(len(u.bits)) for u in every))
    fitting = (p for p in picks if sum(u.bits[c] for u, c in zip(every, p, strict=True)) <= budget)
    return min(sum(u.losses[c] for u, c in zip(every, p, strict=True)) for p in fitting)


@pytest.mark.parametrize("seed", range(5))
def test_within_the_budget_nothing_much_better_is_left(seed):
    every = units(seed)
    low, high = (sum(pick(u.bits) for u in every) for pick in (min, max))
    for budget in np.linspace(low, high, 9):
        picked = choose(every, budget)
        bits, loss = (sum(getattr(u, f)[c] for u, c in zip(every, picked, strict=True)) for f in ("bits", "losses"))
        assert bits <= budget
        # A step of a unit takes at most as many bits as its largest one: with so many fewer nothing is better.
        step = max(float(np.diff(u.bits).max()) for u in every)
        assert loss <= best(every, max(low, budget - step)) * (1 + 1e-12)
    assert choose(every, high) == [int(np.argmin(u.losses)) for u in every]


def test_a_setting_that_costs_more_and_loses_more_is_never_chosen():
    worse = Choices(np.array([2.0, 3.0, 4.0]), np.array([1.0, 1.5, 0.1]))
    assert choose([worse], 3.5) == [0]
    assert choose([worse], 4.0) == [2]


def test_what_matters_more_gets_the_bits():
    bits = np.array([3.0, 4.0])
    every = [Choices(bits, weight * 4.0**-bits) for weight in (1.0, 10.0, 2.0, 5.0)]
    assert choose(every, 14.0) == [0, 1, 0, 1]
