"""What search and rounding weigh errors by: the Gram of a group's input, shrunk, and what the method made of it.

A group of few columns spends more time on its factor than on anything else, so it is made once, for the input without
a scale. With a scale s the Gram H of the input becomes ``H / (s s^T)``, whose inverse is ``diag(s) H^-1 diag(s)``: in
the order of the factor U it is ``(U diag(s))^T (U diag(s))``, and ``U diag(s)`` is upper triangular as U is.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.algorithm.compensation import GramFactor
from awq_jax.algorithm.methods import METHODS, Method
from awq_jax.calibration import shrinkage
from awq_jax.calibration.calibration import Stats
from awq_jax.config import AwqConfig
from awq_jax.pack import Array

KEPT = 1 << 27  # bytes that `KeptInputs` holds at most

Sums = tuple[Array, np.float32]  # of `awq_jax.calibration.means.Means.collect_gram`


class How(NamedTuple):
    """How an `Input` is made.

    Attributes:
      rows: channels, filled up with some of no energy.
      method: of quantization.
      damping: see `AwqConfig`.
      shrink: by which share Grams are shrunk; None: each by its own.
    """

    rows: int
    method: Method
    damping: float
    shrink: float | None

    @classmethod
    def of(cls, config: AwqConfig, rows: int) -> How:
        """What settings say. Plain rounding weighs nothing: its errors are as seen."""
        method = METHODS[config.method]
        return cls(rows, method, config.damping, config.shrinkage if method.needs_statistics else 0.0)


class Input(NamedTuple):
    """The input of one instance of a group.

    Attributes:
      gram: float32 ``[rows, rows]``, the mean of ``x^T x``, shrunk; None where nothing is known.
      factor: what the method's rounder made of it.
      shrunk: by which share it was shrunk.
      energy: `Method.channel_energy` ``[rows]``, if the method has one.
    """

    gram: jax.Array | None
    factor: GramFactor | None
    shrunk: jax.Array
    energy: jax.Array | None


def _of_sums(gram: jax.Array, count: jax.Array, how: How) -> Input:
    mean, share = _mean(gram, count, how)
    factor = how.method.rounder.prepare(mean, how.damping)
    energy = None if how.method.channel_energy is None else how.method.channel_energy(mean, factor)
    return Input(mean, factor, share, energy)


def _mean(gram: jax.Array, count: jax.Array, how: How) -> tuple[jax.Array, jax.Array]:
    share = shrinkage.share(gram, count) if how.shrink is None else jnp.float32(how.shrink)
    mean = gram / count
    mean = mean if how.shrink == 0 else shrinkage.shrunk(mean, share)
    return jnp.pad(mean, (0, how.rows - len(gram))), share


def _scaled(given: Input, scale: jax.Array) -> Input:
    assert given.gram is not None
    s = jnp.pad(scale, (0, len(given.gram) - len(scale)), constant_values=1.0)
    factor = given.factor
    if factor is not None:
        factor = GramFactor(factor.order, factor.inverse * s[factor.order], factor.damping / (s * s))
    energy = None if given.energy is None else given.energy / (s * s)
    return Input(given.gram / (s[:, None] * s), factor, given.shrunk, energy)


of_sums = jax.jit(_of_sums, static_argnames="how")
"""The `Input` of `Sums`."""

of_sums_in_place = jax.jit(_of_sums, static_argnames="how", donate_argnames="gram")
"""`of_sums` in the memory of the sum, which is gone then."""

mean_gram = jax.jit(lambda gram, count, how: _mean(gram, count, how)[0], static_argnames="how")
"""`Input.gram` of `Sums`, without its factor."""

scaled = jax.jit(_scaled)
"""An `Input` whose channels are divided by a scale ``[K]``, K at most its rows."""

scaled_in_place = jax.jit(_scaled, donate_argnames="given")
"""`scaled` in the memory of what is given, which is gone then."""


class KeptInputs:
    """Inputs that the search of some groups has made, for their rounding: up to `KEPT` bytes.

    Args:
      wanted: False keeps nothing: where several devices share the work each makes its own.
    """

    def __init__(self, wanted: bool = True) -> None:
        self._room = KEPT if wanted else 0
        self._inputs: dict[str, list[tuple[Stats, int, How, Input]]] = {}

    def put(self, group: str, stats: Stats, instance: int, how: How, made: Input) -> None:
        """Keep what was made of ``stats`` of a group, if there is room."""
        size = sum(a.nbytes for a in jax.tree.leaves(made))
        if size <= self._room:
            self._room -= size
            self._inputs.setdefault(group, []).append((stats, instance, how, made))

    def get(self, group: str, stats: Stats | None, instance: int, how: How) -> Input | None:
        """What was made of the very same ``stats`` in the same way; None if it was not, or is not there any more."""
        found = (kept[3] for kept in self._inputs.get(group, ()) if kept[0] is stats and kept[1:3] == (instance, how))
        return next(found, None)

    def drop(self, group: str) -> None:
        """Make room: the group is done."""
        for *_, made in self._inputs.pop(group, ()):
            self._room += sum(a.nbytes for a in jax.tree.leaves(made))
