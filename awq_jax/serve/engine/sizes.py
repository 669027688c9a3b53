"""The sizes that are compiled for, and how many tokens there is room for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from awq_jax.errors import ConfigError
from awq_jax.serve import cpu_copy

SHARE = 0.5  # of the free memory that the cache may take unasked
MOST = 8192  # tokens of a slot, unless more are asked for
SMALLEST_READ, SMALLEST_CHUNK, STEP = 256, 16, 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is compiled for.

    Attributes:
      slots: requests at once.
      length: tokens of a request, prompt and answer.
      chunk: tokens of a prompt that are read between two steps.
      rows: slots of one step, rising; the last is ``slots``.
      draws: rows of logits that are drawn from at once, rising; the last is ``slots``.
      reads: tokens of a slot that attention sees, rising; the last is the whole slot.
      chunks: tokens of one piece of a prompt, rising.
    """

    slots: int
    length: int
    chunk: int
    rows: tuple[int, ...]
    draws: tuple[int, ...]
    reads: tuple[int, ...]
    chunks: tuple[int, ...]

    @classmethod
    def of(cls, slots: int, length: int, chunk: int, whole: bool = False) -> Sizes:
        """For these limits.

        Args:
          whole: prompts may have to be read in one piece, however long.
        """
        chunks = rising(SMALLEST_CHUNK, length if whole else min(chunk, rising(SMALLEST_CHUNK, length, 2)[-1]), 2)
        # A piece is written as a whole, padding included, so the last may begin anywhere.
        allocated = -(-(length + chunks[-1]) // 64) * 64
        rows, draws, reads = rising(1, slots, 2), rising(1, slots, STEP), rising(SMALLEST_READ, allocated, STEP)
        return cls(slots, length, chunk, rows, draws, reads, chunks)

    @property
    def allocated(self) -> int:
        """Tokens of a slot, with those that padding is written to."""
        return self.reads[-1]

    def window(self, taken: Sequence[int]) -> tuple[int, int]:
        """First slot and number of slots of the smallest window with these slots in it."""
        low, high = min(taken), max(taken)
        rows = fitting(self.rows, high - low + 1)
        return min(low, self.slots - rows), rows


def rising(smallest: int, largest: int, step: int) -> tuple[int, ...]:
    """``smallest``, and ``step`` times as many each, and ``largest``, which is at least twice the one before it."""
    sizes = []
    while 2 * smallest <= largest:
        sizes.append(smallest)
        smallest *= step
    return (*sizes, largest)


def fitting(sizes: Sequence[int], need: int) -> int:
    """The smallest of these sizes, which rise, that is enough."""
    return next(size for size in sizes if size >= need)


def longest(slots: int, per_token: int, fixed: int, most: int, chunk: int, device: jax.Device) -> int:
    """Tokens of a slot that fit into `SHARE` of the free memory.

    Args:
      slots: how many there are.
      per_token: bytes of a token.
      fixed: bytes of a slot that do not depend on tokens.
      most: that a model can read.
      chunk: tokens that a slot has besides.
      device: where the cache lies.

    Raises:
      ConfigError: there is no room for a cache of any use.
    """
    most = min(most, MOST)
    free = free_bytes(device)
    if free is None or not per_token:
        return most
    tokens = int(SHARE * free / slots - fixed) // per_token - chunk
    if tokens < min(64, most):
        raise ConfigError(
            f"{slots} slots leave no room for a cache: of {free / 1e6:,.0f} MB that are free half are taken, and a "
            f"token takes {per_token:,} bytes: set fewer slots (--max-slots), a short length (--max-length), or 8 bits "
            "(--kv-bits 8)"
        )
    return min(most, tokens if tokens < 64 else tokens // 64 * 64)


def free_bytes(device: jax.Device) -> int | None:
    """Bytes of memory that a device has left, or None if it does not say."""
    if device.platform == "cpu":
        return cpu_copy.room()
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
