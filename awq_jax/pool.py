"""Devices that share the work on one block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Pool:
    """Devices that work side by side on pieces of the same shape.

    A piece is computed by the same program wherever it lands, and results are put together in the order of
    the pieces, so that nothing depends on the number of devices.

    Attributes:
      devices: in the order in which pieces are dealt out; empty for wherever JAX puts things by itself.
    """

    devices: tuple[jax.Device, ...] = ()

    @property
    def size(self) -> int:
        """How many pieces are worked on at a time."""
        return max(1, len(self.devices))

    def spread(self, tree: Any) -> Callable[[int], Any]:
        """A copy of ``tree`` on every device: a function from the number of a piece to the copy it can use."""
        if not self.devices:
            return lambda piece: tree
        copies = [jax.device_put(tree, d) for d in self.devices]
        return lambda piece: copies[piece % len(copies)]

    def place(self, piece: int, tree: Any) -> Any:
        """``tree`` on the device that works on ``piece``."""
        return jax.device_put(tree, self.devices[piece % self.size]) if self.devices else tree

    def map(self, pieces: int, run: Callable[[int], T]) -> list[T]:
        """``run(0), ..., run(pieces - 1)``, each dispatching work on the device of its piece.

        Waits for as many as there are devices, which bounds the memory of what is under way.
        """
        out: list[T] = []
        for start in range(0, pieces, self.size):
            out += [run(i) for i in range(start, min(start + self.size, pieces))]
            jax.block_until_ready(out[start:])
        return out


HERE = Pool()  # one device, wherever JAX puts things
