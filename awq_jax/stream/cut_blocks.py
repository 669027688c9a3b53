"""The compiled programs of a block that is cut at the inputs of its groups: from cut to cut, and sums there."""

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.algorithm.correction import Moments
from awq_jax.calibration import by_expert, expert_grams
from awq_jax.calibration.calibration import Stats, Wanted, batch_sums
from awq_jax.calibration.two_streams import PairSums, pair_sums
from awq_jax.pack import Array
from awq_jax.plan.plan import ScaleGroup
from awq_jax.qtensor import Weight
from awq_jax.stream.decoder_blocks import Leaves
from awq_jax.trace import interpret
from awq_jax.trace.segments import Given, Key, Segments


class Programs:
    """The compiled segments of blocks of one kind, for one shape of batches.

    Args:
      apply: the block's function, of its parameters and what goes in.
      leaves: its parameters, for their shapes and dtypes.
      x: what goes in, likewise.
      groups: with names within the block.
    """

    def __init__(self, apply: Callable[..., object], leaves: Leaves, x: object, groups: Sequence[ScaleGroup]) -> None:
        program = interpret.trace(apply, _shapes(dict(leaves)), _shapes(x))
        keys = [tuple((s.path, s.part) for s in g.sites) for g in groups]
        self.segments = Segments(program, keys)
        self.groups = {g.name: i for i, g in enumerate(groups)}
        self._of = list(groups)
        self._go = [self._segment(i) for i in range(len(keys) + 1)]
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

    def pair(
        self,
        number: int,
        f: Sequence[np.ndarray],
        q: Sequence[np.ndarray],
        place: Callable[[Any], Any],
        *given: Array,
        span: tuple[int, int],
        judged: bool,
    ) -> PairSums:
        """Sums over tokens of a batch, see `awq_jax.calibration.two_streams.pair_sums`.

        Args:
          f, q: what is alive in both streams.
          place: brings arrays to the device that is to do it.
          given: what divides the input in the quantized stream; weights and their numbers, see there.
          span, judged: see there.
        """
        s = self.segments
        both = [(s.input_of(number, x), s.streams_of(number, x)) for x in (q, f)]
        return _pair(*place((both, given)), np.asarray(span, np.int32), np.asarray(judged))

    def group(self, number: int) -> ScaleGroup:
        """With names within the block."""
        return self._of[number]

    def stats(
        self, number: int, alive: Sequence[np.ndarray], place: Callable[[Any], Any], span: tuple[int, int]
    ) -> Stats:
        """The statistics of one stream at a group whose inputs can be compared; ``span``: the tokens that count."""
        return _alone(place(self.segments.input_of(number, alive)), np.asarray(span, np.int32))

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

    def no_pair(self, number: int, columns: int) -> PairSums:
        """`pair` of no token; in a process that has no batch, for what results look like."""
        k, r = self._of[number].channels, sum(self.widths(number).values())
        gram, none = np.zeros((k, k), np.float32), np.zeros((), np.float32)
        moments = Moments(*(jnp.asarray(x) for x in (gram, gram, np.zeros((k, r), np.float32))))
        return PairSums(Stats(gram, gram[0], none, none), moments, jnp.zeros(columns, jnp.float32))

    def no_tap(self, number: int, experts: int | None) -> Stats:
        """`tap` of no token, likewise."""
        shapes = Wanted(self._of[number], experts).shapes()
        return jax.tree.map(lambda a: np.zeros(a.shape, np.float32), shapes)

    def widths(self, number: int) -> dict[Key, int]:
        """Channels of the stream that a weight's result is added to, by weight."""
        return {k: int(np.shape(s.value)[-1]) for k, s in self.segments.cuts[number].streams.items()}

    def _segment(self, number: int) -> tuple[Callable[..., list[jax.Array]], tuple[str, ...]]:
        _, wanted = self.segments.segment(number)
        return jax.jit(lambda params, before: self.segments.run(number, params, before)), wanted

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


# Of the shapes alone, not of the block: groups of as many channels share them.
@jax.jit
def _alone(x: jax.Array, span: jax.Array) -> Stats:
    counts = (jnp.arange(len(x)) >= span[0]) & (jnp.arange(len(x)) < span[1])
    return batch_sums(jnp.where(counts[:, None], x, 0))


@jax.jit
def _pair(
    both: list[tuple[jax.Array, list[Given]]],
    given: tuple[jax.Array, jax.Array, jax.Array],
    span: jax.Array,
    judged: jax.Array,
) -> PairSums:
    (a, after), (b, before) = both
    scale, w, streamed = given
    a = a.astype(jnp.float32) * scale
    errors = [f.in_units() - q.in_units() for q, f in zip(after, before, strict=True)]
    d = jnp.concatenate([jnp.zeros((len(a), 0), jnp.float32), *errors], axis=1)
    return pair_sums(a, b, d, w, streamed, span, judged)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def key_of(leaves: Leaves, x: jax.ShapeDtypeStruct) -> Hashable:
    """What a block's programs are compiled for, besides its kind."""
    dtypes = tuple((p, tuple(a.shape), str(a.dtype)) for p, a in sorted(leaves.items()))
    return dtypes, tuple(x.shape), str(x.dtype)
