"""Statistics of all batches, added in the order of the batches whatever device they come from.

With several devices each keeps some rows of every Gram: a round's Grams (one of each device) change hands by
an all-to-all, so that each device receives its rows of all of them, and adds them one after another. The
volume is that of a reduce-scatter, which would add in an order that depends on the number of devices.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from awq_jax.calibration.calibration import Stats, Wanted, plain_zeros
from awq_jax.devices.pool import AXIS, Pool, replicator
from awq_jax.pack import Array

ByGroup = dict[str, Stats]  # by the name of the group, without the prefix


class Accumulator:
    """Adds up the `Stats` of groups, batch by batch, with the sums spread over all devices.

    Args:
      pool: devices that the statistics come from.
      wanted: whose.
      prefix: what the names of the groups have in front of those in ``wanted``.
    """

    def __init__(self, pool: Pool, wanted: Sequence[Wanted], prefix: str = "") -> None:
        self._pool, self._prefix = pool, prefix
        self._shapes = {w.group.name: w.shapes() for w in wanted}
        self._shared = pool.size > 1 or pool.team is not None
        self._stats = _zeros(pool, self._shapes) if self._shared else plain_zeros(self._shapes)
        self._idle: dict[jax.Device, ByGroup] = {}

    @property
    def names(self) -> list[str]:
        """The groups, with the prefix."""
        return [self._prefix + name for name in self._stats]

    def fetch(self, name: str) -> Stats:
        """The sums of one group, put together on one device of each process.

        With several processes all must fetch the same ones in the same order.

        Args:
          name: one of `names`.

        Raises:
          KeyError: ``name`` is none of them.
          ProcessError: another process has ended.
        """
        own = name.removeprefix(self._prefix)
        if not name.startswith(self._prefix) or own not in self._stats:
            raise KeyError(name)
        return self._whole(own) if self._shared else self._stats[own]

    def add(self, round: Mapping[int, ByGroup], first: int, count: int, skip: int = 0) -> None:
        """Add the statistics of batches ``first + skip`` to ``first + count - 1``, and wait for it.

        Args:
          round: those of this process's batches, by batch; each array with a leading axis of 1, on the device
            of its batch.
          first: a multiple of the number of devices.
          count: at most the number of devices.
          skip: below ``count``.

        Raises:
          ProcessError: another process has ended.
        """
        if not self._stats:
            return
        if not self._shared:
            self._stats = _add(self._stats, round[first])
        else:
            arrays = [round[first + i] if first + i in round else self._zeros_of(d) for i, d in self._places()]
            self._pool.meet()
            span = np.asarray((skip, count), np.int32)
            self._stats = _adder(self._pool.mesh)(self._stats, self._together(arrays), span)
        jax.block_until_ready(self._stats)

    def _places(self) -> list[tuple[int, jax.Device]]:
        """The devices of this process, with their places."""
        return [(i, d) for i, d in enumerate(self._pool.devices) if self._pool.mine(i)]

    def _zeros_of(self, device: jax.Device) -> ByGroup:
        """What a device without a batch adds."""
        if device not in self._idle:
            zeros = jax.tree.map(lambda a: np.zeros((1, *a.shape), np.float32), self._shapes)
            self._idle[device] = jax.device_put(zeros, device)
        return self._idle[device]

    def _together(self, arrays: list[ByGroup]) -> ByGroup:
        """One array ``[devices, ...]`` of what each device has."""
        sharding = NamedSharding(self._pool.mesh, PartitionSpec(AXIS))

        def one(*parts: jax.Array) -> jax.Array:
            shape = (self._pool.size, *parts[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, sharding, list(parts))

        return jax.tree.map(one, *arrays)

    def _whole(self, name: str) -> Stats:
        k = self._shapes[name].gram.shape[-1]
        if self._pool.team is None:
            stats = jax.device_put(self._stats[name], SingleDeviceSharding(self._pool.devices[0]))
        else:
            self._pool.meet()
            replicated = jax.block_until_ready(replicator(self._pool.mesh)(self._stats[name]))
            stats = jax.tree.map(lambda a: a.addressable_data(0), replicated)
        return Stats(_rows(stats.gram, k=k), stats.abs, stats.count, stats.dropped)


@functools.partial(jax.jit, donate_argnums=0)
def _add(sums: ByGroup, new: ByGroup) -> ByGroup:
    return jax.tree.map(lambda a, b: a + b[0], sums, new)


@functools.partial(jax.jit, static_argnames="k")
def _rows(gram: jax.Array, *, k: int) -> jax.Array:
    return gram[..., :k, :]


def _specs(lead: int) -> Stats:
    """How the sums lie on the devices; ``lead``: axes before the Gram's two."""
    every: Any = PartitionSpec()
    rows: Any = _by_rows(lead)
    return Stats(rows, every, every, every)


def _by_rows(lead: int) -> PartitionSpec:
    return PartitionSpec(*(None,) * lead, AXIS)


def _zeros(pool: Pool, shapes: ByGroup) -> ByGroup:
    def zeros(shape: tuple[int, ...], spec: PartitionSpec) -> jax.Array:
        sharding = NamedSharding(pool.mesh, spec)
        return jax.make_array_from_callback(shape, sharding, functools.partial(_block, shape, sharding))

    out = {}
    for name, s in shapes.items():
        *lead, rows, k = s.gram.shape
        filled = (*lead, -(-rows // pool.size) * pool.size, k)
        every = (zeros(a.shape, PartitionSpec()) for a in (s.abs, s.count, s.dropped))
        out[name] = Stats(zeros(filled, _by_rows(len(lead))), *every)
    return out


def _block(shape: tuple[int, ...], sharding: NamedSharding, index: tuple[slice, ...] | None) -> np.ndarray:
    return np.zeros(sharding.shard_shape(shape), np.float32)


@functools.cache
def _adder(mesh: Mesh) -> Callable[[ByGroup, ByGroup, np.ndarray], ByGroup]:
    """``(sums, new, span) -> sums`` with the arrays made by devices from ``span[0]`` on, below ``span[1]``."""
    size = mesh.size

    def one(total: Array, parts: jax.Array, span: jax.Array) -> Array:
        for i in range(size):
            total = jnp.where((span[0] <= i) & (i < span[1]), total + parts[i], total)
        return total

    def group(sums: Stats, new: Stats, span: jax.Array) -> Stats:
        axis = new.gram.ndim - 2
        short = -new.gram.shape[axis] % size
        gram = jnp.pad(new.gram, [(0, short if i == axis else 0) for i in range(new.gram.ndim)])
        gram = jax.lax.all_to_all(gram, AXIS, split_axis=axis, concat_axis=0, tiled=True)

        def every(a: Array) -> jax.Array:
            return jax.lax.all_gather(a, AXIS, axis=0, tiled=True)

        return Stats(
            one(sums.gram, gram, span),
            one(sums.abs, every(new.abs), span),
            one(sums.count, every(new.count), span),
            one(sums.dropped, every(new.dropped), span),
        )

    def local(sums: ByGroup, new: ByGroup, span: jax.Array) -> ByGroup:
        return {name: group(s, new[name], span) for name, s in sums.items()}

    def run(sums: ByGroup, new: ByGroup, span: jax.Array) -> ByGroup:
        lies = {name: _specs(s.gram.ndim - 2) for name, s in sums.items()}
        devices = jax.tree.map(lambda _: PartitionSpec(AXIS), new)
        return jax.shard_map(
            local, mesh=mesh, in_specs=(lies, devices, PartitionSpec()), out_specs=lies, check_vma=False
        )(sums, new, span)

    return jax.jit(run, donate_argnums=0)
