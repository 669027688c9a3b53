"""What each method of quantization is: `AwqConfig.method` names one of `METHODS`, and nothing else tells them apart."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from awq_jax.algorithm.clipping import diagonal_blocks
from awq_jax.algorithm.compensation import GramFactor, compensate, conditional_energy, factorize
from awq_jax.algorithm.descent import descend
from awq_jax.algorithm.grid import Grid, column_loss, encode, error_of
from awq_jax.config import MethodName


class Rounder(Protocol):
    """How the codes of a matrix ``w [K, N]`` are chosen on a given grid."""

    def prepare(self, gram: jax.Array, damping: float) -> GramFactor | None:
        """What all columns need besides the Gram ``[K, K]`` of the scaled input; made once for them."""

    def clip_metric(self, gram: jax.Array, factor: GramFactor | None, group: int) -> jax.Array:
        """What an error costs in the search for clipped ranges; see `awq_jax.algorithm.clipping.clip_search`."""

    def codes(
        self, w: jax.Array, gram: jax.Array, factor: GramFactor | None, grid: Grid, bits: int
    ) -> tuple[jax.Array, jax.Array]:
        """Codes float32 ``[K, N]``, and the expected squared output error of each column ``[N]``."""


class Nearest:
    """Each weight by itself, to the nearest code."""

    def prepare(self, gram: jax.Array, damping: float) -> None:
        return None

    def clip_metric(self, gram: jax.Array, factor: GramFactor | None, group: int) -> jax.Array:
        return diagonal_blocks(gram, group)

    def codes(
        self, w: jax.Array, gram: jax.Array, factor: GramFactor | None, grid: Grid, bits: int
    ) -> tuple[jax.Array, jax.Array]:
        codes = encode(w.reshape(len(grid.scale), -1, w.shape[-1]), grid, bits).reshape(w.shape)
        return codes, column_loss(error_of(codes, grid, w), gram)


class Compensated:
    """Row by row, each error made up for by the rows not yet rounded; then each code once more, given all others."""

    def prepare(self, gram: jax.Array, damping: float) -> GramFactor:
        return factorize(gram, damping)

    def clip_metric(self, gram: jax.Array, factor: GramFactor | None, group: int) -> jax.Array:
        return energy_left_by_compensation(gram, factor).reshape(-1, group)

    def codes(
        self, w: jax.Array, gram: jax.Array, factor: GramFactor | None, grid: Grid, bits: int
    ) -> tuple[jax.Array, jax.Array]:
        assert factor is not None
        codes, damped = compensate(w, factor, grid, bits)
        error = error_of(codes, grid, w)
        loss = jnp.maximum(damped - column_loss(error, factor.damping), 0.0)
        codes, change = descend(codes, error, gram, grid, bits)
        return codes, jnp.maximum(loss + change, 0.0)


def energy_left_by_compensation(gram: jax.Array, factor: GramFactor | None) -> jax.Array:
    """`conditional_energy` ``[K]`` of a Gram ``[K, K]``."""
    assert factor is not None
    return conditional_energy(gram, factor)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of quantization.

    Attributes:
      rounder: how codes are chosen.
      needs_statistics: scales and clipped ranges are searched, and each column takes the best of several
        roundings. Without, weights go to the nearest code of the whole range and statistics only tell the error.
      channel_energy: what an error in each channel costs in the scale search, of the Gram and what ``rounder``
        made of it: a diagonal metric ``[K]``, whose root also stands for the size of the channel. None: the whole
        Gram, and ``E|x|``.
    """

    rounder: Rounder
    needs_statistics: bool = True
    channel_energy: Callable[[jax.Array, GramFactor | None], jax.Array] | None = None


METHODS: dict[MethodName, Method] = {
    "rtn": Method(Nearest(), needs_statistics=False),
    "awq": Method(Nearest()),
    "awq+gptq": Method(Compensated(), channel_energy=energy_left_by_compensation),
}
