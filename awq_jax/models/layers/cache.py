"""The KV cache: what each layer keeps of the tokens seen so far.

What a layer keeps is a `LayerCache`, a class for each kind; what it is given may also be a part of something larger
that reads alike, `Tokens`. Its mixer (`attention`, `latent_attention`, `delta_net`) makes it of a prompt, which comes
without one, and reads and extends it for each token after. Whoever wants a cache before the first token, or its size,
has `init_cache`, where `empty` makes of a layer's config what its mixer makes.
Everything else goes through `Cache`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, Self, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from awq_jax.models.config import AttentionConfig, DeltaConfig, LatentConfig, LayerConfig, ModelConfig
from awq_jax.placement import Placement


class LayerCache(Protocol):
    """What one layer keeps: a pytree of arrays ``[B, ...]``, or of their shapes."""

    def grown(self, slots: int) -> Self:
        """The same with room for ``slots`` tokens in a row."""

    def shardings(self, place: Placement) -> Self:
        """A `NamedSharding` in place of each array."""

    def bytes_per_token(self, devices: int) -> int:
        """By how much each device's part grows with a token of a row."""


class Tokens(Protocol):
    """What attention needs of a cache: `KeyValues`, or a part of a larger one."""

    @property
    def keys(self) -> jax.Array:
        """``[B, S, KV, head_dim]``."""

    @property
    def values(self) -> jax.Array:
        """``[B, S, KV, value_dim]``."""

    def written(self, keys: jax.Array, values: jax.Array, start: jax.Array) -> Tokens:
        """With those of T more tokens ``[B, T, KV, ...]`` in the slots from each row's ``start [B]``."""

    def attended(self, q: jax.Array, positions: jax.Array, scale: float, window: int | None) -> jax.Array | None:
        """Softmax attention of one query for each row, ``[B, H, head_dim]``, to what stands up to its position
        ``[B]``, without anything added to the scores; None where reading `keys` and `values` does as well."""


Past = LayerCache | Tokens  # what a layer is given and gives back


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys and values: slot ``s`` of a row holds position ``s``; slots beyond its length are garbage and never read.

    Layers with a sliding window keep all tokens; latent layers keep the expanded keys and values: larger, but a
    step reads them as they are, where latents would be multiplied by ``kv_b_proj`` again for every token seen.

    Attributes:
      keys: ``[B, S, KV, head_dim]``.
      values: ``[B, S, KV, value_dim]``.
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, rows: tuple[int, int, int], key_dim: int, value_dim: int, dtype: DTypeLike) -> KeyValues:
        """Of no tokens; ``rows`` is ``(B, S, KV)``."""
        return cls(jnp.zeros((*rows, key_dim), dtype), jnp.zeros((*rows, value_dim), dtype))

    def written(self, keys: jax.Array, values: jax.Array, start: jax.Array) -> KeyValues:
        """With those of T more tokens ``[B, T, KV, ...]`` in the slots from each row's ``start [B]``."""

        def row(old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=0)

        return KeyValues(jax.vmap(row)(self.keys, keys, start), jax.vmap(row)(self.values, values, start))

    def attended(self, q: jax.Array, positions: jax.Array, scale: float, window: int | None) -> None:
        """None: there is no other way."""

    def grown(self, slots: int) -> KeyValues:
        return jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, slots - a.shape[1]), (0, 0), (0, 0))), self)

    def shardings(self, place: Placement) -> KeyValues:
        """By head where the heads can be shared out, else everywhere."""
        axis = place.axis if self.keys.shape[2] % place.size == 0 else None
        return jax.tree.map(lambda _: place.sharding(PartitionSpec(None, None, axis)), self)

    def bytes_per_token(self, devices: int) -> int:
        heads = self.keys.shape[2]
        each = sum(math.prod(a.shape[2:]) * a.dtype.itemsize for a in (self.keys, self.values))
        return each // (devices if heads % devices == 0 else 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recurrent:
    """The state of a gated delta net, which does not grow.

    Attributes:
      inputs: the last ``window - 1`` inputs of the convolution, ``[B, window - 1, channels]``.
      memory: float32 ``[B, value_heads, key_dim, value_dim]``.
    """

    inputs: jax.Array
    memory: jax.Array

    @classmethod
    def empty(cls, c: DeltaConfig, batch: int, dtype: DTypeLike) -> Recurrent:
        """The state before the first token."""
        channels = 2 * c.key_heads * c.key_dim + c.value_heads * c.value_dim
        memory = jnp.zeros((batch, c.value_heads, c.key_dim, c.value_dim))
        return cls(jnp.zeros((batch, c.window - 1, channels), dtype), memory)

    def grown(self, slots: int) -> Recurrent:
        return self

    def shardings(self, place: Placement) -> Recurrent:
        """Everywhere."""
        return jax.tree.map(lambda _: place.sharding(PartitionSpec()), self)

    def bytes_per_token(self, devices: int) -> int:
        return 0


def empty(layer: LayerConfig, batch: int, length: int, dtype: DTypeLike) -> LayerCache:
    """What a layer keeps of no tokens, with room for ``length`` in each of ``batch`` rows."""
    c = layer.attention
    if isinstance(c, AttentionConfig):
        return KeyValues.empty((batch, length, c.kv_heads), c.head_dim, c.head_dim, dtype)
    if isinstance(c, LatentConfig):
        return KeyValues.empty((batch, length, c.heads), c.head_dim, c.value_dim, dtype)
    return Recurrent.empty(c, batch, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What all layers keep.

    Attributes:
      layers: of each layer.
      shift: int32 ``[B]``: what a token's angles are ahead of its position, after an image that takes
        more or less room than it has tokens; None for nothing.
    """

    layers: tuple[Past, ...]
    shift: jax.Array | None = None

    def whole(self) -> tuple[LayerCache, ...]:
        """Layers of a cache that stands alone, as those of models do."""
        return cast(tuple[LayerCache, ...], self.layers)

    def grown(self, slots: int) -> Cache:
        """The same with room for ``slots`` tokens in a row."""
        return Cache(tuple(layer.grown(slots) for layer in self.whole()), self.shift)

    def shardings(self, place: Placement) -> Cache:
        """A `NamedSharding` in place of each array: how the cache lies on a mesh."""
        shift = jax.tree.map(lambda _: place.sharding(PartitionSpec()), self.shift)
        return Cache(tuple(layer.shardings(place) for layer in self.whole()), shift)


def init_cache(config: ModelConfig, batch: int, length: int, dtype: DTypeLike) -> Cache:
    """An empty cache for ``batch`` rows of up to ``length`` tokens."""
    return Cache(tuple(empty(layer, batch, length, dtype) for layer in config.layers))


def bytes_per_token(config: ModelConfig, devices: int, dtype: DTypeLike = jnp.bfloat16) -> int:
    """Bytes that each device keeps of a token, of a row."""
    cache = jax.eval_shape(lambda: init_cache(config, 1, 1, dtype))
    return sum(layer.bytes_per_token(devices) for layer in cache.whole())
