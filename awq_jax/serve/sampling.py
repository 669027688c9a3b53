"""Choosing the next token from logits."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from awq_jax.errors import ConfigError

Mode = Literal["greedy", "plain", "filtered"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to pick a token.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: of those, keep the most likely ones that together reach this probability
        (arXiv 1904.09751); 1 keeps all.

    Raises:
      ConfigError: on a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature must be 0 (greedy) or a positive number; got {self.temperature}")
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise ConfigError(f"top_k must be 0 (off) or a positive integer; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1 (off); got {self.top_p}")

    @property
    def mode(self) -> Mode:
        """Which of three programs is compiled; the numbers themselves are arguments of it."""
        if self.temperature == 0:
            return "greedy"
        return "plain" if self.top_k == 0 and self.top_p == 1 else "filtered"


def sample(
    logits: jax.Array, key: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array, mode: Mode
) -> jax.Array:
    """One token per row.

    Args:
      logits: float32 ``[B, V]``.
      key: PRNG key; each row draws from its own stream, so a row does not depend on its neighbours.
      temperature, top_k, top_p: scalars, see `Sampling`.
      mode: `Sampling.mode`.

    Returns:
      int32 ``[B]``.
    """
    if mode == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if mode == "filtered":
        logits = keep_likely(logits, top_k, top_p)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_likely(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """``logits [B, V]`` with -inf for the tokens that ``top_k`` (0: off) and then ``top_p`` exclude."""
    falling = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    falling = jnp.where((top_k == 0) | (rank < top_k), falling, -jnp.inf)
    mass = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1)
    before = jnp.concatenate([jnp.zeros_like(mass[:, :1]), mass[:, :-1]], axis=-1)
    least = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
