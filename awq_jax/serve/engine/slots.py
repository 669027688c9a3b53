"""The cache of all slots, and the window of it that one call reads and writes.

Heads come before tokens in memory, so that attention reads those of each head in one stretch.

The arrays of all slots stay where they are: a call is given the first slot and how many, and how many tokens of each it
may read. Layers see a window as any cache (`awq_jax.models.layers.cache`).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, Self, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from awq_jax.kernels import native_attention
from awq_jax.models.config import AttentionConfig
from awq_jax.models.layers import attention
from awq_jax.models.layers.cache import Cache, KeyValues, Past, Recurrent
from awq_jax.placement import Placement

T = TypeVar("T")


class Store(Protocol):
    """Keys and values ``[B, KV, S, ...]`` in some form: a pytree of arrays with these leading axes."""

    def of(self, keys: jax.Array, values: jax.Array) -> Self:
        """Others ``[B, KV, S, D]`` in the same form."""

    def floats(self) -> KeyValues:
        """As attention reads them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Floats:
    """As they are."""

    keys: jax.Array
    values: jax.Array

    def of(self, keys: jax.Array, values: jax.Array) -> Floats:
        return Floats(keys.astype(self.keys.dtype), values.astype(self.values.dtype))

    def floats(self) -> KeyValues:
        return KeyValues(self.keys, self.values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bytes:
    """In 8 bits: ``x = codes * scales``, a scale for each token and head, as KIVI and vLLM have it for int8.

    Attributes:
      keys, values: int8 ``[B, KV, S, D]``, -127 to 127.
      key_scales, value_scales: float32 ``[B, KV, S]``.
      dtype: of what attention reads.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array
    value_scales: jax.Array
    dtype: str = dataclasses.field(metadata={"static": True})

    def of(self, keys: jax.Array, values: jax.Array) -> Bytes:
        (k, ks), (v, vs) = rounded(keys), rounded(values)
        return Bytes(k, v, ks, vs, self.dtype)

    def floats(self) -> KeyValues:
        def wide(codes: jax.Array, scales: jax.Array) -> jax.Array:
            return (codes.astype(jnp.float32) * scales[..., None]).astype(self.dtype)

        return KeyValues(wide(self.keys, self.key_scales), wide(self.values, self.value_scales))


def rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x [..., D]`` as int8 codes of the same shape and float32 scales ``[...]``."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis=-1) / 127
    codes = jnp.round(x / jnp.where(scale == 0, 1.0, scale)[..., None])
    return codes.astype(jnp.int8), scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """Keys and values of the slots from ``first``, of which ``read`` tokens each are read.

    Attributes:
      store: of all slots, ``[slots, KV, S, ...]``.
      first: int32 scalar.
      rows: slots in the window.
      read: tokens of each that attention may see.
      compiled: attention may be `awq_jax.kernels.native_attention`'s.
    """

    store: Store
    first: jax.Array
    rows: int = dataclasses.field(metadata={"static": True})
    read: int = dataclasses.field(metadata={"static": True})
    compiled: bool = dataclasses.field(default=False, metadata={"static": True})

    def written(self, keys: jax.Array, values: jax.Array, start: jax.Array) -> Window:
        """With those of T more tokens ``[B, T, KV, ...]`` from each row's ``start [B]``. One token that would stand
        beyond the end is dropped; several are of a single row, and must fit."""
        new = self.store.of(jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2))

        def put(all: jax.Array, one: jax.Array) -> jax.Array:
            if one.shape[2] == 1:
                rows, heads = jnp.arange(self.rows)[:, None], jnp.arange(one.shape[1])
                return all.at[self.first + rows, heads, start[:, None]].set(one[:, :, 0], mode="drop")
            assert one.shape[0] == 1
            return jax.lax.dynamic_update_slice(all, one, (self.first, 0, start[0], *[0] * (one.ndim - 3)))

        return dataclasses.replace(self, store=jax.tree.map(put, self.store, new))

    def _floats(self) -> KeyValues:
        def cut(a: jax.Array) -> jax.Array:
            sizes = (self.rows, a.shape[1], self.read, *a.shape[3:])
            return jax.lax.dynamic_slice(a, (self.first, *[0] * (a.ndim - 1)), sizes)

        return cast(Store, jax.tree.map(cut, self.store)).floats()

    @property
    def keys(self) -> jax.Array:
        """``[B, read, KV, head_dim]``."""
        return jnp.swapaxes(self._floats().keys, 1, 2)

    @property
    def values(self) -> jax.Array:
        """``[B, read, KV, value_dim]``."""
        return jnp.swapaxes(self._floats().values, 1, 2)

    def attended(self, q: jax.Array, positions: jax.Array, scale: float, window: int | None) -> jax.Array | None:
        """By compiled code where there is some: each row reads as many tokens as it has."""
        store = self.store
        if not (self.compiled and isinstance(store, Floats)):
            return None
        if native_attention.obstacle(q, store.keys, store.values) is not None:
            return None

        def otherwise(
            q: jax.Array, keys: jax.Array, values: jax.Array, first: jax.Array, positions: jax.Array
        ) -> jax.Array:
            own = dataclasses.replace(self, store=Floats(keys, values), first=first)
            c = AttentionConfig(q.shape[1], keys.shape[1], q.shape[2], scale=scale)
            return attention.attend(q[:, None], own.keys, own.values, positions[:, None], c, window)[:, 0]

        return native_attention.attend(
            q, store.keys, store.values, self.first, positions, scale=scale, window=window, otherwise=otherwise
        )


def empty(row: Cache, slots: int, length: int, kv_bits: int | None = None) -> Cache:
    """The cache of ``slots`` empty slots of ``length`` tokens.

    Args:
      row: the shapes of a cache of one row (of any length), as a model makes it.
      kv_bits: 8, or None for keys and values as the model makes them.
    """

    def layer(one: Past) -> Past:
        if not isinstance(one, KeyValues):
            return jax.tree.map(lambda a: jnp.zeros((slots, *a.shape[1:]), a.dtype), one)
        shapes = [(slots, a.shape[2], length, a.shape[3]) for a in (one.keys, one.values)]
        if kv_bits is None:
            store: Store = Floats(*(jnp.zeros(s, one.keys.dtype) for s in shapes))
        else:
            (k, v), (ks, vs) = ([jnp.zeros(s, jnp.int8) for s in shapes], [jnp.zeros(s[:-1]) for s in shapes])
            store = Bytes(k, v, ks, vs, jnp.dtype(one.keys.dtype).name)
        return cast(Past, store)

    shift = None if row.shift is None else jnp.zeros(slots, row.shift.dtype)
    return Cache(tuple(map(layer, row.layers)), shift)


def shardings(cache: Cache, place: Placement) -> Cache:
    """A `NamedSharding` in place of each array: keys and values by head where the heads can be shared out."""

    def by_head(a: jax.Array) -> object:
        cut = a.shape[1] % place.size == 0
        return place.sharding(PartitionSpec(None, place.axis) if cut else PartitionSpec())

    def whole(_: jax.Array) -> object:
        return place.sharding(PartitionSpec())

    layers = tuple(jax.tree.map(by_head if is_store(c) else whole, c) for c in cache.layers)
    return Cache(layers, jax.tree.map(whole, cache.shift))


def is_store(layer: object) -> bool:
    """Whether a layer keeps tokens, rather than a state that took them in."""
    return isinstance(layer, Floats | Bytes)


def opened(
    cache: Cache, first: jax.Array, rows: int, read: int, fresh: jax.Array | None = None, compiled: bool = False
) -> Cache:
    """What the layers see of ``rows`` slots from ``first``.

    Args:
      fresh: bool scalar: the slot has a new owner, whose state is empty.
      compiled: see `Window`.
    """

    def layer(one: Past) -> Past:
        if is_store(one):
            return Window(cast(Store, one), first, rows, read, compiled)
        state = _cut(one, first, rows)
        return state if fresh is None else jax.tree.map(lambda a: jnp.where(fresh, jnp.zeros_like(a), a), state)

    shift = None if cache.shift is None else _cut(cache.shift, first, rows)
    return Cache(tuple(map(layer, cache.layers)), shift)


def closed(cache: Cache, seen: Cache, first: jax.Array, active: jax.Array) -> Cache:
    """The cache of all slots after a call that left ``seen`` of a window; ``active [B]``: rows that took part."""

    def layer(all: Past, window: Past) -> Past:
        if isinstance(window, Window):
            return cast(Past, window.store)
        assert isinstance(window, Recurrent)

        def put(a: jax.Array, new: jax.Array) -> jax.Array:
            old = jax.lax.dynamic_slice_in_dim(a, first, new.shape[0])
            keep = active.reshape(-1, *[1] * (new.ndim - 1))
            return jax.lax.dynamic_update_slice_in_dim(a, jnp.where(keep, new.astype(a.dtype), old), first, axis=0)

        return jax.tree.map(put, all, window)

    return Cache(tuple(map(layer, cache.layers, seen.layers)), cache.shift)


def copied(cache: Cache, source: jax.Array, target: jax.Array, length: int) -> Cache:
    """With the first ``length`` tokens of slot ``source`` in slot ``target`` as well."""

    def one(a: jax.Array) -> jax.Array:
        zeros = [0] * (a.ndim - 1)
        part = jax.lax.dynamic_slice(a, (source, *zeros), (1, a.shape[1], length, *a.shape[3:]))
        return jax.lax.dynamic_update_slice(a, part, (target, *zeros))

    return Cache(tuple(jax.tree.map(one, c) for c in cache.layers), cache.shift)


def nbytes(cache: Cache) -> int:
    """Bytes of a cache, or of its shapes."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))


def _cut(tree: T, first: jax.Array, rows: int) -> T:
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, rows), tree)
