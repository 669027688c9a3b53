"""What a tower makes of images, and how it takes its place among the tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Features(NamedTuple):
    """Features of all images of a batch, in the order of their tokens.

    Attributes:
      flat: ``[N, hidden]``.
      deep: of the same shape each: added to what the first layers of the decoder make.
    """

    flat: jax.Array
    deep: tuple[jax.Array, ...] = ()


def ranks(seen: jax.Array) -> jax.Array:
    """The number of each image token among all of the batch: int32 of the shape of ``seen``; -1 before the first."""
    return (jnp.cumsum(seen.reshape(-1)) - 1).reshape(seen.shape)


def place(features: jax.Array, seen: jax.Array, others: jax.Array) -> jax.Array:
    """Features ``[N, hidden]`` at the tokens that are ``seen [B, T]``, and ``others [B, T, hidden]`` elsewhere."""
    rows = features[jnp.clip(ranks(seen), 0, features.shape[0] - 1)]
    return jnp.where(seen[..., None], rows.astype(others.dtype), others)


def blocks(seen: jax.Array) -> jax.Array:
    """Number of the run of image tokens that each token is in: int32 ``[B, T]``, -1 for text."""
    first = seen & ~jnp.pad(seen, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(seen, jnp.cumsum(first, axis=1), -1)
