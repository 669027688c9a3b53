"""Which batches of a calibration are kept from all fitting, to judge by."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
SHARE = 8  # one batch of so many is kept out
FEWEST = 4  # batches of which one is


def in_turn(batches: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Every batch, and whether it is kept out: every eighth, and the last if there are four to seven of them."""
    waiting: list[T] = []  # of which it is not known yet whether it is the last
    for number, batch in enumerate(batches):
        if waiting:
            yield waiting.pop(), False
        if FEWEST <= number + 1 < SHARE:
            waiting.append(batch)
        else:
            yield batch, number % SHARE == SHARE - 1
    for batch in waiting:
        yield batch, True
