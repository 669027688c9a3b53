"""The float and the quantized stream of a block: each group is rounded before the next one's input is made.

At the input of a group (see `awq_jax.trace.segments`) all batches of both streams stand still. What the group reads
there in the quantized model is what it is rounded for, and how that differs from what it reads in the float model is
what its weights are corrected by (`awq_jax.algorithm.correction`). Then both go on to the next group.
"""

import functools
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.algorithm import correction
from awq_jax.algorithm.correction import Moments
from awq_jax.calibration import by_expert, expert_grams
from awq_jax.calibration.calibration import Stats, Wanted, batch_sums
from awq_jax.calibration.expert_grams import ExpertGrams, ExpertStats
from awq_jax.calibration.two_streams import pair_sums
from awq_jax.devices.pool import Pool
from awq_jax.pack import Array
from awq_jax.plan.fold import Folder
from awq_jax.plan.plan import ScaleGroup
from awq_jax.qtensor import QuantizedTensor, Weight
from awq_jax.quantizer.column_pieces import CanonicalWeight, Columns, Place, sweep
from awq_jax.quantizer.following import Aim
from awq_jax.quantizer.scale_groups import GroupScale
from awq_jax.quantizer.targets import Target
from awq_jax.stream.decoder_blocks import Apply, Leaves
from awq_jax.trace import interpret
from awq_jax.trace.segments import Key, Segments

Alive = list[np.ndarray]


class Programs:
    """The compiled segments of blocks of one kind, for one shape of batches.

    Args:
      apply: the block's function.
      leaves: its parameters, for their shapes and dtypes.
      x: what goes in, likewise.
      groups: with names within the block.
    """

    def __init__(self, apply: Apply, leaves: Leaves, x: np.ndarray, groups: Sequence[ScaleGroup]) -> None:
        program = interpret.trace(apply, _shapes(dict(leaves)), _shapes(x))
        keys = [tuple((s.path, s.part) for s in g.sites) for g in groups]
        self.segments = Segments(program, keys)
        self.groups = {g.name: i for i, g in enumerate(groups)}
        self._of = list(groups)
        self._go = [self._segment(i) for i in range(len(keys) + 1)]
        self._sums = [jax.jit(functools.partial(self._pair, i)) for i in range(len(keys))]
        self._taps = {
            (i, n): jax.jit(functools.partial(self._tap, Wanted(g, n)))
            for i, g in enumerate(groups)
            for n in {None, 0, expert_grams.at_a_time(g)}
        }

    def go(self, number: int, params: Mapping[str, Weight], before: Sequence[Array]) -> list[jax.Array]:
        """Segment ``number``."""
        run, wanted = self._go[number]
        return run({p: params[p] for p in wanted}, list(before))

    def paired(self, number: int) -> bool:
        """Whether a group's two inputs can be compared: one weight meets all rows."""
        group = self._of[number]
        return self.segments.cuts[number].direct and not group.scan and not group.batch

    def pair(self, number: int, f: Sequence[Array], q: Sequence[Array], scale: Array) -> tuple[Stats, Moments]:
        """Sums over a batch; ``f``, ``q``: what is alive in both streams; ``scale`` divides the input in the latter."""
        return self._sums[number](list(f), list(q), scale)

    def tap(
        self,
        number: int,
        params: Mapping[str, Weight],
        alive: Sequence[Array],
        scale: Array,
        start: int = 0,
        experts: int | None = None,
    ) -> Stats:
        """The statistics of one stream, whose inputs are divided by ``scale``.

        Args:
          experts: see `awq_jax.calibration.calibration.Wanted`; ``start`` is the first of them.
        """
        return self._taps[number, experts](dict(params), list(alive), scale, np.int32(start))

    def widths(self, number: int) -> dict[Key, int]:
        """Channels of the stream that a weight's result is added to, by weight."""
        return {k: int(np.shape(s.value)[-1]) for k, s in self.segments.cuts[number].streams.items()}

    def _segment(self, number: int) -> tuple[Callable[..., list[jax.Array]], tuple[str, ...]]:
        _, wanted = self.segments.segment(number)
        return jax.jit(lambda params, before: self.segments.run(number, params, before)), wanted

    def _pair(self, number: int, f: list[jax.Array], q: list[jax.Array], scale: jax.Array) -> tuple[Stats, Moments]:
        s = self.segments
        a, b = s.input_of(number, q).astype(jnp.float32) * scale, s.input_of(number, f)
        errors = [s.stream_of(number, k, f) - s.stream_of(number, k, q) for k in s.cuts[number].streams]
        d = jnp.concatenate([jnp.zeros((len(a), 0), jnp.float32), *errors], axis=1)
        return pair_sums(a, b, d)

    def _tap(
        self, wanted: Wanted, params: dict[str, jax.Array], alive: list[jax.Array], scale: jax.Array, start: jax.Array
    ) -> Stats:
        group, number = wanted.group, self.groups[wanted.group.name]
        first = self.segments.cuts[number].keys[0]

        def tap(use: interpret.Use, x: jax.Array, expert: jax.Array | None = None) -> Stats | None:
            if (use.path, use.part) != first:
                return None
            if expert is not None:
                experts = math.prod(group.batch)
                x = x * scale.reshape(experts, -1)[jnp.maximum(expert, 0)]
                return Stats(*by_expert.sums(x, expert, experts))
            x = x if group.scan else x * scale[..., None, :]
            if wanted.experts:
                x = jax.lax.dynamic_slice_in_dim(x.reshape(-1, *x.shape[-2:]), start, wanted.experts)
            return batch_sums(x, summed=wanted.experts == 0)

        (stats,) = self.segments.tapped(number, params, alive, tap).values()
        assert isinstance(stats, Stats)
        extra = stats.count.ndim - len(wanted.shapes().count.shape)  # loops that read the same weight every time
        stats = jax.tree.map(lambda a: a.sum(axis=tuple(range(extra))) if extra else a, stats)
        if not group.scan:
            return stats
        return Stats(
            stats.gram * scale[..., :, None] * scale[..., None, :], stats.abs * scale, stats.count, stats.dropped
        )


class Lockstep:
    """Both streams of one block.

    Args:
      programs: for a batch of the shape of what goes in; one object for all batches that are alike.
      prefix: of the block's parameters.
      leaves: the block's float parameters, by path within it.
      float_in, quantized_in: what goes in, by the number of the batch; only those of this process.
      folds: of each batch, the number of its fold.
      pool: devices that share the work.
    """

    def __init__(
        self,
        programs: Callable[[np.ndarray], Programs],
        prefix: str,
        leaves: Leaves,
        float_in: dict[int, np.ndarray],
        quantized_in: dict[int, np.ndarray],
        folds: Sequence[int],
        pool: Pool,
    ) -> None:
        self._programs = {i: programs(x) for i, x in float_in.items()}
        self._prefix, self._leaves = prefix, dict(leaves)
        self._float = {i: [x] for i, x in float_in.items()}
        self._quantized = {i: [x] for i, x in quantized_in.items()}
        self._folds, self._pool = folds, pool
        self._served: dict[str, Weight] = dict(leaves)  # the quantized model's parameters, as far as they are known
        self._reached = 0
        self.strengths: dict[str, correction.Strength] = {}

    def begin(self, absorbed: Folder, targets: Collection[str]) -> None:
        """All scales are known; ``absorbed``: folds those that upstream parameters absorb."""
        for path, leaf in self._leaves.items():
            if self._prefix + path not in targets:
                self._served[path] = absorbed.leaf(self._prefix + path, leaf)

    def reach(self, group: ScaleGroup, targets: list[Target], found: GroupScale) -> Aim:
        """Go on to the input of ``group`` and say what it is rounded for."""
        number = self._number(group)
        first = next(iter(self._programs.values()))
        scale = np.ones((*group.scan, *group.batch, group.channels), np.float32)
        if found.scale is not None and group.absorbers:
            scale = np.asarray(found.scale, np.float32)
        if first.paired(number):
            stats, folds = self._to_pair(number, scale)
            aims = self._corrected(group, targets, folds, first.widths(number))
        else:
            stats, aims = self._to_tap(number, group, scale), {}
        self._reached = number + 1
        return Aim(stats, aims)

    def put(self, group: ScaleGroup, packed: Mapping[str, QuantizedTensor], targets: list[Target]) -> None:
        """The group's weights are packed: the quantized stream goes on with them."""
        for t in targets:
            path = t.site.path.removeprefix(self._prefix)
            value = packed[t.site.name].dequantize()
            if t.site.part:
                value = jnp.asarray(self._served[path]).at[t.site.window].set(value)
            self._served[path] = value

    def skip(self, served: Leaves) -> None:
        """Go to the last group with the parameters that the quantized model has: ``served``."""
        self._served |= served
        copies = self._pool.spread(self._served)
        for number in range(self._reached, len(next(iter(self._programs.values())).groups)):
            for i in self._quantized:
                self._forward(number, copies, self._quantized, i)
            self._reached = number + 1

    def finish(self) -> dict[int, np.ndarray]:
        """What comes out of the block in the quantized stream, by batch."""
        copies = self._pool.spread(self._served)
        for i in self._quantized:
            assert len(self._programs[i].groups) == self._reached, "a group has not been rounded"
            self._forward(self._reached, copies, self._quantized, i)
        return {i: alive[0] for i, alive in self._quantized.items()}

    def _number(self, group: ScaleGroup) -> int:
        name = group.name.removeprefix(self._prefix)
        return next(iter(self._programs.values())).groups[name]

    def _forward(self, number: int, copies: Callable[[int], Any], streams: dict[int, Alive], i: int) -> list[jax.Array]:
        """One batch of one stream to cut ``number``."""
        alive = self._programs[i].go(number, copies(i), self._pool.place(i, jax.device_put(streams[i])))
        streams[i] = [np.asarray(x) for x in alive]
        return alive

    def _to_pair(self, number: int, scale: np.ndarray) -> tuple[Stats, list[Moments]]:
        """The statistics of the quantized stream, and the moments of each fold."""
        floats, served = self._pool.spread(self._leaves), self._pool.spread(self._served)

        def run(i: int) -> tuple[Stats, Moments]:
            f = self._forward(number, floats, self._float, i)
            q = self._forward(number, served, self._quantized, i)
            return self._programs[i].pair(number, f, q, self._pool.place(i, scale))

        sums = self._sum(run)
        return functools.reduce(_add, (s for s, _ in sums.values())), [m for _, m in sums.values()]

    def _to_tap(self, number: int, group: ScaleGroup, scale: np.ndarray) -> Stats:
        """The statistics of the quantized stream; experts' Grams some at a time where memory wants it."""
        floats, served = self._pool.spread(self._leaves), self._pool.spread(self._served)
        size = expert_grams.at_a_time(group)

        def run(i: int) -> Stats:
            self._forward(number, floats, self._float, i)
            q = self._forward(number, served, self._quantized, i)
            given = served(i), q, self._pool.place(i, scale)
            return self._programs[i].tap(number, *given, experts=None if size is None else 0)

        stats: Stats = functools.reduce(_add, self._sum(run).values())
        if size is None:
            return stats

        def collect(start: int) -> Array:
            def again(i: int) -> Stats:
                alive = self._pool.place(i, jax.device_put(self._quantized[i]))
                given = served(i), alive, self._pool.place(i, scale)
                return self._programs[i].tap(number, *given, start, experts=size)

            some: Stats = functools.reduce(_add, self._sum(again).values())
            return some.gram

        return ExpertStats(**vars(stats), expert_grams=ExpertGrams(stats.gram, size, collect))

    def _sum(self, run: Callable[[int], Any]) -> dict[int, Any]:
        """What ``run`` gives for each batch, added up in the order of the batches, by fold."""
        sums: dict[int, Any] = {}
        pool, count = self._pool, len(self._folds)
        for first in range(0, count, pool.size):
            some = range(first, min(first + pool.size, count))

            def of_round(i: int, first: int = first) -> Any:
                return run(first + i)

            for i, one in zip(some, pool.map(len(some), of_round), strict=True):
                one = jax.device_put(one, pool.devices[0]) if pool.devices else one
                fold = self._folds[i]
                sums[fold] = _add(sums[fold], one) if fold in sums else one
        return sums

    def _corrected(
        self, group: ScaleGroup, targets: list[Target], folds: list[Moments], widths: Mapping[Key, int]
    ) -> dict[str, Weight]:
        """The weights to be rounded, float32, by path."""
        weights = [CanonicalWeight.of(t, self._leaves[t.site.path.removeprefix(self._prefix)]) for t in targets]
        columns = Columns(weights, group.channels)
        offsets: dict[Key, int] = {}
        for key in widths:
            offsets[key] = sum(widths[k] for k in offsets)
        streamed = []
        for t, w in zip(targets, weights, strict=True):
            key = (t.site.path.removeprefix(self._prefix), t.site.part)
            fits = key in offsets and widths[key] == w.columns
            streamed.append(offsets[key] + np.arange(w.columns) if fits else np.full(w.columns, -1))
        which = np.concatenate(streamed).astype(np.int32)
        which = np.pad(which, (0, columns.pieces * columns.size - columns.total), constant_values=-1)
        some = correction.some_columns(columns.total)
        picked = np.concatenate([columns.piece(0, 0, i) for i in range(columns.pieces)], axis=1)[:, some]
        chosen = correction.strengths(folds, picked, which[some]) if len(folds) > 1 else correction.NONE
        self.strengths[group.name] = chosen
        if not chosen.alpha and not chosen.rho:
            return {}
        total = functools.reduce(_add, folds)
        strength = tuple(np.float32(x) for x in chosen)

        def prepare(moments: Moments) -> Moments:
            return correction.prepare(moments, *strength)

        def run(place: Place, e: int, piece: int, prepared: Moments) -> jax.Array:
            span = slice(piece * columns.size, (piece + 1) * columns.size)
            return correction.corrected(place(columns.piece(0, 0, piece)), prepared, place(which[span]))

        (pieces,) = sweep(self._pool, 1, columns.pieces, lambda e: total, prepare, run)
        whole = np.concatenate(pieces, axis=1)
        out: dict[str, Weight] = {}
        start = 0
        for t, w in zip(targets, weights, strict=True):
            path = t.site.path
            before = out.get(path, self._leaves[path.removeprefix(self._prefix)])
            out[path] = jax.device_put(_to_leaf(whole[:, start : start + w.columns], t, before))
            start += w.columns
        return out


def _to_leaf(w: np.ndarray, t: Target, leaf: Weight) -> np.ndarray:
    """``[K, N]`` as the leaf has it, float32; of a part of a leaf, the leaf with that part replaced."""
    site = t.site
    order = [d for r in "bkn" for d, a in enumerate(site.canonical_axes) if a == r]
    sizes = [site.part_shape[d] for d in order]
    # Stored as [*b, *k, *n]; a group without batch axes has its batch among the columns.
    b = sum(a == "b" for a in site.canonical_axes)
    assert not b
    part = np.transpose(w.reshape(sizes), np.argsort(order))
    if not site.part:
        return np.ascontiguousarray(part)
    assert not isinstance(leaf, QuantizedTensor)
    out = np.array(leaf, np.float32)
    out[site.window] = part
    return out


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


@jax.jit
def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def key_of(leaves: Leaves, x: np.ndarray) -> Hashable:
    """What a block's programs are compiled for, besides its kind."""
    dtypes = tuple((p, tuple(a.shape), str(a.dtype)) for p, a in sorted(leaves.items()))
    return dtypes, tuple(x.shape), str(x.dtype)
