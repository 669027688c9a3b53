"""Weights side by side, a few columns at a time: what bounds the memory of search and rounding.

Columns of a weight are quantized independently of each other once the statistics of its input are known,
so they are worked on in pieces ``[K, C]`` of one shape: one compiled program, memory for one piece, and the
same bits however many devices share them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from awq_jax.devices import host
from awq_jax.devices.pool import Pool
from awq_jax.pack import Array
from awq_jax.plan import fold
from awq_jax.qtensor import QuantizedTensor, Weight, split_shape, to_canonical
from awq_jax.quantizer.targets import Target

PIECE = {"cpu": 1 << 18}  # numbers in a piece, by backend: on a CPU what its caches hold
PIECE_ELSEWHERE = 1 << 25  # accelerators: enough columns to keep them busy
HOST_PIECE = 1 << 18  # numbers that NumPy looks at together
MOST_COLUMNS = {"cpu": 320}  # by backend: so few that most weights of as many rows are cut into pieces of one shape
ALIGNED = 64  # columns in a piece are a multiple of it
SPARE = 0.15  # of the columns may be zeros that fill up the last piece

Fetched = TypeVar("Fetched")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")


Place = Callable[[Array], Array]  # brings a piece to the device that works on it


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["leaf", "steps"], meta_fields=["axes", "order", "scan", "experts"]
)
@dataclasses.dataclass(frozen=True)
class CanonicalWeight:
    """One weight, seen as ``[S, E, K, N]``.

    S counts scanned layers (1 without a scan), E the experts with an activation of their own (or 1), K the
    contracted rows, N the output columns.

    Attributes:
      leaf: float, with axes as ``axes`` says.
      axes: see `awq_jax.qtensor.QuantizedTensor.axes`.
      scan: S, the number of scanned layers.
      experts: E, the number of experts with an activation of their own (1 if they share one: then the
        columns of all experts stand side by side).
      steps: what to multiply and divide the leaf by on the way; see `awq_jax.plan.fold.Folder.steps`.
      order: the batch axes as layers and experts are numbered, scanned ones first; None for as they stand.
    """

    leaf: Array
    axes: str
    scan: int = 1
    experts: int = 1
    steps: tuple[fold.ScaleStep, ...] = ()
    order: tuple[int, ...] | None = None

    @classmethod
    def of(cls, target: Target, leaf: Weight, steps: tuple[fold.ScaleStep, ...] = ()) -> CanonicalWeight:
        """The weight of ``target``, which is not packed yet."""
        assert not isinstance(leaf, QuantizedTensor)
        scan, experts = math.prod(target.group.scan), math.prod(target.group.batch)
        site, whole = target.site, off_mesh(leaf)
        if site.part:
            here = host.view(whole)
            part = whole[site.window] if here is None else here[site.window]
            steps = fold.steps_within(steps, site.part)
            return cls(part, site.canonical_axes, scan, experts, steps, batch_order(target))
        return cls(whole, site.canonical_axes, scan, experts, steps, batch_order(target))

    @property
    def columns(self) -> int:
        """N."""
        _, k, _ = split_shape(self.leaf.shape, self.axes)
        return self.leaf.size // (math.prod(k) * self.scan * self.experts)

    def take(self, layer: int, expert: int, start: int, size: int) -> Array:
        """Columns ``start ... start + size - 1`` of one instance, float32 ``[K, size]``.

        By NumPy if the leaf is in host memory: XLA would compile a program for every shape and choice of steps.
        """
        whole = host.view(self.leaf)
        alike = None if whole is None else fold.steps_on_host(self.steps, whole.shape)
        if whole is None or alike is None:
            return self.take_compiled(layer, expert, start, size)

        def columns(a: Array) -> np.ndarray:
            w = self._canonical(np.broadcast_to(a, whole.shape))[layer, expert]  # [M, K, N]
            n = w.shape[-1]
            first, stop = start // n, start + size
            w = np.moveaxis(w[first : -(-stop // n)], 0, 1)  # views up to here, unless a leaf is laid out oddly
            return w.reshape(len(w), -1)[:, start - first * n : stop - first * n]

        steps = tuple(dataclasses.replace(step, values=columns(step.values)) for step in alike)
        return fold.scaled(columns(whole).astype(np.float32), steps)

    def _canonical(self, leaf: np.ndarray) -> np.ndarray:
        """``[S, E, M, K, N]``, with M experts that share one activation."""
        w = to_canonical(leaf, self.axes)
        if self.order is not None:
            w = np.transpose(w, (*self.order, w.ndim - 2, w.ndim - 1))
        return w.reshape(self.scan, self.experts, -1, *w.shape[-2:])

    @functools.partial(jax.jit, static_argnames="size")
    def take_compiled(self, layer: int, expert: int, start: int, size: int) -> jax.Array:
        """`take` of a leaf on an accelerator, or on several devices."""
        w = to_canonical(fold.scaled(cast(jax.Array, self.leaf).astype(jnp.float32), self.steps), self.axes)
        k, n = w.shape[-2:]
        if self.order is not None:
            w = jnp.transpose(w, (*self.order, w.ndim - 2, w.ndim - 1))
        # Experts that share one activation become more columns.
        w = jnp.moveaxis(w.reshape(self.scan, self.experts, -1, k, n), 2, 3).reshape(self.scan, self.experts, k, -1)
        return jax.lax.dynamic_slice(w, (layer, expert, 0, start), (1, 1, k, size))[0, 0]

    def largest(self) -> float:
        """The largest magnitude of all."""
        whole = host.view(self.leaf)
        if whole is None or fold.steps_on_host(self.steps, whole.shape) is None:
            return float(self.largest_compiled())
        some = max(1, HOST_PIECE * self.columns * self.scan * self.experts // self.leaf.size)
        return max(
            float(np.abs(self.take(layer, expert, start, min(some, self.columns - start))).max())
            for layer, expert in np.ndindex(self.scan, self.experts)
            for start in range(0, self.columns, some)
        )

    @jax.jit
    def largest_compiled(self) -> jax.Array:
        """`largest` of a leaf on an accelerator, or on several devices."""
        return jnp.abs(fold.scaled(cast(jax.Array, self.leaf).astype(jnp.float32), self.steps)).max()


@dataclasses.dataclass(frozen=True)
class Columns:
    """Weights with the same input and the same storage, side by side.

    Attributes:
      weights: in order.
      rows: K filled up with rows of zeros.
    """

    weights: Sequence[CanonicalWeight]
    rows: int

    @property
    def total(self) -> int:
        """Of all weights."""
        return sum(p.columns for p in self.weights)

    @property
    def pieces(self) -> int:
        """How many pieces they are cut into."""
        return -(-self.total // self._most)

    @property
    def size(self) -> int:
        """Columns of a piece; the last may have fewer, and is filled up with zeros."""
        if self.pieces == 1:
            return self.total
        if self.pieces * self._most <= (1 + SPARE) * self.total:
            return self._most  # so that other weights of as many rows are rounded by the same program
        return -(-self.total // (self.pieces * ALIGNED)) * ALIGNED

    @property
    def _most(self) -> int:
        backend = jax.default_backend()
        most = PIECE.get(backend, PIECE_ELSEWHERE) // self.rows
        most = min(most, MOST_COLUMNS.get(backend, most))
        return max(ALIGNED, most - most % ALIGNED)

    def piece(self, layer: int, expert: int, number: int) -> Array:
        """float32 ``[rows, size]``."""
        low, high = number * self.size, min((number + 1) * self.size, self.total)
        found, before = [], 0
        for p in self.weights:
            start, stop = max(low - before, 0), min(high - before, p.columns)
            if start < stop:
                found.append(p.take(layer, expert, start, stop - start))
            before += p.columns
        xp: ModuleType = np if all(isinstance(w, np.ndarray) for w in found) else jnp
        w = found[0] if len(found) == 1 else xp.concatenate(found, axis=1)
        short = (self.rows - w.shape[0], self.size - w.shape[1])
        return xp.pad(w, [(0, n) for n in short]) if any(short) else w

    def largest(self) -> float:
        """The largest magnitude of all."""
        return max(p.largest() for p in self.weights)


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """JAX's settings under which everything is searched and rounded, whatever the user's are."""
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"):
        yield


def sweep(
    pool: Pool,
    experts: int,
    pieces: int,
    fetch: Callable[[int], Fetched],
    prepare: Callable[[Fetched], Prepared],
    run: Callable[[Place, int, int, Prepared], Result],
) -> list[list[Result]]:
    """Work on all pieces of all experts, with what each expert's pieces have in common made once a device.

    Args:
      experts, pieces: how many.
      fetch: what belongs to an expert; called in order, in every process.
      prepare: makes of that what the expert's pieces need; on each device that has one of them.
      run: ``run(place, expert, piece, prepared)``.

    Returns:
      Results by expert and piece, as NumPy arrays.
    """

    def of_experts(low: int, high: int) -> list[list[Result]]:
        """Results of experts ``low ... high - 1``."""
        fetched = [fetch(e) for e in range(low, high)]
        ready: dict[tuple[int, int], Prepared] = {}
        alone = threading.Lock()

        def one(number: int) -> Result:
            e, i = divmod(number, pieces)
            key = e, number % pool.size
            with settings():  # a thread has settings of its own
                with alone:
                    if key not in ready:
                        ready[key] = prepare(pool.place(number, fetched[e]))
                return run(functools.partial(pool.place, number), low + e, i, ready[key])

        done = jax.device_get(pool.map(len(fetched) * pieces, one))
        return [done[i * pieces : (i + 1) * pieces] for i in range(len(fetched))]

    window = -(-pool.size // pieces)  # experts whose pieces are worked on at a time
    starts = range(0, experts, window)
    return [row for low in starts for row in of_experts(low, min(low + window, experts))]


def off_mesh(leaf: jax.Array) -> jax.Array:
    """A leaf on a mesh with Explicit axes as an array whose type has no sharding."""
    mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
    if any(kind == AxisType.Explicit for kind in getattr(mesh, "axis_types", ())):
        return jax.device_put(np.asarray(leaf))
    return leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf)


def batch_order(target: Target) -> tuple[int, ...]:
    """The batch axes of the leaf, as numbered among them: those that scans go through first, then its experts."""
    site = target.site
    every = [d for d, a in enumerate(site.axes) if a in "sb"]
    return tuple(every.index(d) for d in (*site.scan_axes, *(d for d in every if d not in site.scan_axes)))


def to_batched(a: np.ndarray, target: Target) -> np.ndarray:
    """``[S, E, R, N]`` (R rows of codes, scales or zeros) to ``[*batch axes of the leaf, R, N]``."""
    group, order = target.group, batch_order(target)
    stored, _, n_dims = split_shape(target.site.part_shape, target.site.canonical_axes)
    batch = [stored[i] for i in order]
    n, rows = math.prod(n_dims), a.shape[2]
    if not group.batch:
        own = math.prod(batch) // math.prod(group.scan)
        a = np.moveaxis(a.reshape(a.shape[0], rows, own, n), 2, 1)
    a = a.reshape(*batch, rows, n)
    return np.transpose(a, (*np.argsort(order).tolist(), len(order), len(order) + 1))


def scale_to_batched(scale: np.ndarray, target: Target) -> np.ndarray:
    """``[*scan, *batch, K]`` to ``[*batch axes of the leaf, K]``."""
    group, order = target.group, batch_order(target)
    stored, _, _ = split_shape(target.site.part_shape, target.site.canonical_axes)
    batch = [stored[i] for i in order]
    lead = (*group.scan, *group.batch)
    scale = np.broadcast_to(
        scale.reshape(*lead, *(1,) * (len(batch) - len(lead)), group.channels), (*batch, group.channels)
    )
    return np.transpose(scale, (*np.argsort(order).tolist(), len(order)))
