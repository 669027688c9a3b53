"""Devices that share the work on one block."""

import dataclasses
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from awq_jax.devices.team import Team
from awq_jax.errors import ConfigError

T = TypeVar("T")  # any tree of arrays
AXIS = "devices"
MOST_THREADS = 16  # each needs the memory of a piece


@dataclasses.dataclass(frozen=True)
class Pool:
    """Devices that work side by side on pieces of the same shape.

    A piece is computed by the same program wherever it lands, and results are put together in the order of
    the pieces, so that nothing depends on the number of devices or processes.

    Attributes:
      devices: in the order in which pieces are dealt out, those of all processes; empty for wherever JAX puts
        things by itself.
      team: the processes, if there are several.
    """

    devices: tuple[jax.Device, ...] = ()
    team: Team | None = None

    @property
    def size(self) -> int:
        """How many pieces are worked on at a time."""
        return max(1, len(self.devices))

    @property
    def at_once(self) -> int:
        """How many pieces a device works on at a time; each takes memory."""
        return 1 if self.devices else _cores()

    @property
    def rank(self) -> int:
        """The number of this process."""
        return self.team.rank if self.team else 0

    @functools.cached_property
    def local(self) -> tuple[jax.Device, ...]:
        """The devices of this process."""
        return tuple(d for d in self.devices if d.process_index == self.rank) if self.team else self.devices

    @functools.cached_property
    def mesh(self) -> Mesh:
        """All devices in one row, for what they do together."""
        return Mesh(np.asarray(self.devices), (AXIS,))

    def mine(self, piece: int) -> bool:
        """Whether a device of this process works on ``piece``."""
        return self.team is None or self.devices[piece % self.size].process_index == self.rank

    def spread(self, tree: T) -> Callable[[int], T]:
        """A copy of ``tree`` on every device: a function from the number of a piece to the copy it can use."""
        if not self.devices:
            return lambda piece: tree
        copies = {d: jax.device_put(tree, d) for d in self.local}
        return lambda piece: copies[self._device(piece)]

    def place(self, piece: int, tree: T) -> T:
        """``tree`` on the device that works on ``piece``."""
        return jax.device_put(tree, self._device(piece)) if self.devices else tree

    def map(self, pieces: int, run: Callable[[int], T]) -> list[T]:
        """``run(0), ..., run(pieces - 1)``, each dispatching work on the device of its piece.

        Waits for as many as there are devices, which bounds the memory of what is under way. With several
        processes each runs its own pieces, all have all results, and those are NumPy arrays. A CPU works on as many
        pieces at a time as it has cores, up to `MOST_THREADS`, in threads that call ``run``: a piece alone, of many
        short products, keeps one core busy and the others waiting.

        Raises:
          ProcessError: another process has ended.
        """
        if min(self.at_once, pieces) > 1:
            return list(_threads().map(lambda piece: jax.block_until_ready(run(piece)), range(pieces)))
        out: list[T] = []
        for start in range(0, pieces, self.size):
            numbers = range(start, min(start + self.size, pieces))
            done = {i: run(i) for i in numbers if self.mine(i)}
            if self.team is None:
                out += jax.block_until_ready(list(done.values()))
            else:  # a process without a piece does one for itself, to know what results look like
                out += self._exchange(numbers, jax.device_get(done), jax.device_get(done or run(start)))
        return out

    def meet(self, text: str = "") -> list[str]:
        """The texts that all processes came with: to be called before they do something together.

        Raises:
          ProcessError: another process has ended.
        """
        return self.team.gather(text) if self.team else [text]

    def _device(self, piece: int) -> jax.Device:
        return self.devices[piece % self.size] if self.mine(piece) else self.local[0]

    def _exchange(self, numbers: range, done: dict[int, T], like: T) -> list[T]:
        """All results of one round, from those of this process."""
        like = next(iter(done.values()), like)
        leaves, tree = jax.tree.flatten(like)
        empty = np.zeros(sum(a.nbytes for a in leaves), np.uint8)
        rows = []
        for place, device in enumerate(self.devices):
            if device.process_index == self.rank:
                result = done.get(numbers.start + place)
                row = empty if result is None else np.concatenate([_bytes(a) for a in jax.tree.leaves(result)])
                rows.append(jax.device_put(row[None], device))
        shape = (self.size, empty.size)
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        self.meet()
        every = replicator(self.mesh)(jax.make_array_from_single_device_arrays(shape, sharding, rows))
        host = np.asarray(every.addressable_data(0))
        return [jax.tree.unflatten(tree, _arrays(host[i - numbers.start], leaves)) for i in numbers]


HERE = Pool()  # one device, wherever JAX puts things


def pool_of(mesh: Mesh | None, team: Team | None) -> Pool:
    """All devices of ``mesh``, in its order; None: one device, or all of them if there are several processes.

    Raises:
      ConfigError: devices of another kind than JAX's default, or a process without one.
    """
    if mesh is None:
        return HERE if team is None else Pool(tuple(jax.devices()), team)
    devices = tuple(mesh.devices.flat)
    backend = jax.default_backend()
    if other := {d.platform for d in devices} - {jax.devices()[0].platform}:
        raise ConfigError(
            f"the mesh has devices of {', '.join(sorted(other))}, and JAX's default is {backend}: make the mesh of "
            "jax.devices(), or set JAX_PLATFORMS"
        )
    there = {d.process_index for d in devices}
    if team is None and there != {jax.process_index()}:
        raise ConfigError("the mesh has devices of other processes, which do not take part")
    if team is not None and (idle := set(range(team.size)) - there):
        raise ConfigError(f"the mesh has no device of process {min(idle)}: every process needs one")
    return Pool(devices, team)


@functools.cache
def _cores() -> int:
    """Pieces that the device at which JAX puts things works on at a time: 1 but for a CPU."""
    if jax.default_backend() != "cpu":
        return 1
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MOST_THREADS)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), "awq_jax")


@functools.cache
def replicator(mesh: Mesh) -> Callable[[T], T]:
    """A function that brings a tree of arrays on ``mesh`` to all of its devices, whole."""
    return jax.jit(lambda a: a, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _bytes(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)


def _arrays(row: np.ndarray, like: list[np.ndarray]) -> list[np.ndarray]:
    out, start = [], 0
    for a in like:
        out.append(row[start : start + a.nbytes].view(a.dtype).reshape(a.shape))
        start += a.nbytes
    return out
