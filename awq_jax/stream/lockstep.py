"""The float and the quantized stream of a block: each group is rounded before the next one's input is made.

The float stream goes first (`Lockstep.calibrate`), and leaves at the input of every group (see
`awq_jax.trace.segments`) what is alive there. Then all batches of the quantized stream go from group to group. What a
group reads there is what it is rounded for, and how that differs from what it reads in the float model is what its
weights are corrected by (`awq_jax.algorithm.correction`).
"""

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.algorithm import correction
from awq_jax.algorithm.correction import Moments
from awq_jax.calibration import expert_grams
from awq_jax.calibration.calibration import Fetch, Stats
from awq_jax.calibration.expert_grams import ExpertGrams, ExpertStats
from awq_jax.calibration.two_streams import PairSums
from awq_jax.devices.pool import Pool
from awq_jax.plan.fold import Folder
from awq_jax.plan.plan import ScaleGroup
from awq_jax.qtensor import QuantizedTensor, Weight
from awq_jax.quantizer import kept_out
from awq_jax.quantizer.following import Aim, Made
from awq_jax.quantizer.group_weights import GroupWeights, dequantized
from awq_jax.quantizer.scale_groups import GroupScale
from awq_jax.quantizer.targets import Target
from awq_jax.stream import folds
from awq_jax.stream.cut_blocks import Programs
from awq_jax.stream.decoder_blocks import Leaves

Alive = list[np.ndarray]
ALL = 2**31 - 1  # more than there are tokens in a batch


class Lockstep:
    """Both streams of one block.

    Args:
      programs: of each batch; one object for all that are alike.
      prefix: of the block's parameters.
      leaves: the block's float parameters, by path within it.
      float_in, quantized_in: what goes in, by the number of the batch; only those of this process.
      alone: tokens of the only batch, half of which are kept out; 0 if there are several.
      fold_of: each batch; see `awq_jax.stream.folds`.
      pool: devices that share the work.

    Attributes:
      strengths: by group, how much of the correction was taken.
      seconds: spent on the way to the groups.
    """

    def __init__(
        self,
        programs: Sequence[Programs],
        prefix: str,
        leaves: Leaves,
        float_in: Mapping[int, Alive],
        quantized_in: Mapping[int, Alive],
        alone: int,
        fold_of: Sequence[int],
        pool: Pool,
    ) -> None:
        self._programs = programs
        self._prefix, self._leaves = prefix, dict(leaves)
        self._float, self._quantized = dict(float_in), dict(quantized_in)
        self._pool = pool
        self._folds = [min(fold, folds.TRIED) for fold in fold_of]  # those that are not tried are one
        self._served: dict[str, Weight] = dict(leaves)  # the quantized model's parameters, as far as they are known
        self._alone = alone
        self._reached = 0
        self._left: list[dict[int, Alive]] = []  # of the float stream, by number of the group
        self._aside: dict[str, Stats] = {}  # of the float stream, the tokens kept out
        self._kept: PairSums | None = None
        self._weights: GroupWeights
        self.seconds = 0.0
        self.strengths: dict[str, correction.Strength] = {}

    def calibrate(self) -> Fetch:
        """Send the float stream through the block; the statistics of its groups, of all tokens but those kept out."""
        floats, first = self._pool.spread(self._leaves), self._programs[0]
        found = {}
        for name, number in first.groups.items():
            group = first.group(number)
            found[self._prefix + name] = self._of_float(number, group, floats)
        return found.get

    def refuse(
        self, group: ScaleGroup, targets: list[Target], stats: Stats | None, alone: Folder, trial: Callable[[], Made]
    ) -> str | None:
        """See `awq_jax.quantizer.kept_out.refused`, by the float stream."""
        leaves = {self._prefix + p: w for p, w in self._leaves.items()}
        return kept_out.refused(group, targets, leaves, stats, self._aside.pop(group.name, None), alone, trial)

    def begin(self, absorbed: Folder, targets: Collection[str]) -> None:
        """All scales are known; ``absorbed``: folds those that upstream parameters absorb."""
        for path, leaf in self._leaves.items():
            if self._prefix + path not in targets:
                self._served[path] = absorbed.leaf(self._prefix + path, leaf)

    def reach(self, group: ScaleGroup, targets: list[Target], found: GroupScale) -> Aim:
        """Go on to the input of ``group`` and say what it is rounded for."""
        start, number = time.perf_counter(), self._number(group)
        first = self._programs[0]
        scale = np.ones((*group.scan, *group.batch, group.channels), np.float32)
        if found.scale is not None and group.is_folded:
            scale = np.asarray(found.scale, np.float32)
        aims: Mapping[str, Weight] = {}
        self._kept = None
        if first.paired(number):
            leaves = {self._prefix + p: w for p, w in self._leaves.items()}
            self._weights = GroupWeights(group, targets, leaves, first.widths(number), self._prefix)
            total, tried = self._to_pair(number, scale)
            stats = total.stats
            strength = correction.NONE
            if tried:
                chosen = self._weights.picked, self._weights.streamed, self._weights.width
                strength = correction.strengths(total.moments, tried, *chosen)
            self.strengths[group.name] = strength
            if strength.alpha or strength.rho:
                aims = self._weights.corrected(self._pool, total.moments, strength)
        else:
            stats = self._to_tap(number, group, scale)
        self._left[number] = {}
        self._reached = number + 1
        self.seconds += time.perf_counter() - start
        return Aim(stats, aims)

    def judge(self, made: Made, folded: Folder, nearest: Callable[[], Made]) -> Made:
        """What to keep of a group that has been rounded: that, or its nearest rounding if it is better.

        By the error on sequences that nothing was fitted to, which the reports are told.
        """
        if self._kept is None:
            return made
        moments, gap, tokens = self._kept.moments, self._kept.gap, float(self._kept.stats.count)
        return kept_out.better(made, self._weights, [(moments, gap)], tokens, folded, nearest)

    def put(self, group: ScaleGroup, packed: Mapping[str, QuantizedTensor], targets: list[Target]) -> None:
        """The group's weights are packed: the quantized stream goes on with them."""
        for t in targets:
            path = t.site.path.removeprefix(self._prefix)
            q = packed[t.site.name]
            value = dequantized(q, q.dtype)
            if t.site.part:
                value = jnp.asarray(self._served[path]).at[t.site.window].set(value)
            self._served[path] = value

    def skip(self, served: Leaves) -> None:
        """Go to the last group with the parameters that the quantized model has: ``served``."""
        self._served |= served
        floats, copies = self._pool.spread(self._leaves), self._pool.spread(self._served)
        for number in range(len(self._programs[0].groups)):
            for i in self._quantized:
                self._forward(number, floats, self._float, i)
                self._forward(number, copies, self._quantized, i)
        self._reached = len(self._programs[0].groups)

    def apart(self, seconds: dict[str, float]) -> dict[str, float]:
        """Seconds by phase, with those on the way to the groups as one of their own."""
        return seconds | {"round": seconds["round"] - self.seconds, "follow": self.seconds}

    def finish(self) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """What comes out of the block in the float and in the quantized stream, by batch."""
        assert len(self._programs[0].groups) == self._reached, "a group has not been rounded"
        for leaves, stream in ((self._leaves, self._float), (self._served, self._quantized)):
            copies = self._pool.spread(leaves)
            for i in stream:
                self._forward(self._reached, copies, stream, i)
        floats, quantized = ({i: alive[0] for i, alive in x.items()} for x in (self._float, self._quantized))
        return floats, quantized

    def _number(self, group: ScaleGroup) -> int:
        name = group.name.removeprefix(self._prefix)
        return self._programs[0].groups[name]

    def _forward(self, number: int, copies: Callable[[int], Any], streams: dict[int, Alive], i: int) -> list[jax.Array]:
        """One batch of one stream to cut ``number``."""
        alive = self._programs[i].go(number, copies(i), self._pool.place(i, jax.device_put(streams[i])))
        streams[i] = [np.asarray(x) for x in alive]
        return alive

    def _to_pair(self, number: int, scale: np.ndarray) -> tuple[PairSums, list[Moments]]:
        """Sums of all that is fitted, and the moments of each fold to be tried; those kept out are put aside."""
        served, left = self._pool.spread(self._served), self._left[number]
        weights = self._weights

        def run(i: int) -> list[PairSums]:
            program = self._programs[i]
            if i not in left:
                return [program.no_pair(number, len(weights.streamed)) for _ in self._spans(i)]
            self._forward(number, served, self._quantized, i)
            streams = left[i], self._quantized[i], functools.partial(self._pool.place, i)
            given = scale, weights.picked, weights.streamed
            return [
                program.pair(number, *streams, *given, span=span, judged=fold == folds.KEPT_OUT)
                for fold, span in self._spans(i)
            ]

        sums: dict[int, PairSums] = self._sum(run)
        self._kept = sums.pop(folds.KEPT_OUT, None)
        tried = [s.moments for fold, s in sums.items() if fold < folds.TRIED] if len(sums) > 1 else []
        return _total(list(sums.values())), tried

    def _spans(self, batch: int) -> list[tuple[int, tuple[int, int]]]:
        """Folds that tokens of a batch are in, and the first token of each and the first after: two of a sequence that
        is alone, else one."""
        if self._alone < 2:
            return [(self._folds[batch], (0, ALL))]
        half = -(-self._alone // 2)
        return [(0, (0, half)), (folds.KEPT_OUT, (half, ALL))]

    def _of_float(self, number: int, group: ScaleGroup, floats: Callable[[int], Any]) -> Stats:
        """The float stream goes on to a group: its statistics there; what is alive is left for `reach`."""
        for i in self._float:
            self._forward(number, floats, self._float, i)
        left = dict(self._float)
        self._left.append(left)
        if not self._programs[0].paired(number):
            ones = np.ones((*group.scan, *group.batch, group.channels), np.float32)
            return self._tapped(number, group, ones, floats, left)

        def run(i: int) -> list[Stats]:
            if i not in left:
                return [self._programs[i].no_tap(number, None) for _ in self._spans(i)]
            place = functools.partial(self._pool.place, i)
            return [self._programs[i].stats(number, left[i], place, span) for _, span in self._spans(i)]

        sums = self._sum(run)
        if folds.KEPT_OUT in sums:
            self._aside[self._prefix + group.name] = sums[folds.KEPT_OUT]
        return self._fitted(sums)

    def _to_tap(self, number: int, group: ScaleGroup, scale: np.ndarray) -> Stats:
        """The statistics of the quantized stream."""
        served = self._pool.spread(self._served)
        for i in self._quantized:
            self._forward(number, served, self._quantized, i)
        return self._tapped(number, group, scale, served, self._quantized)

    def _tapped(
        self, number: int, group: ScaleGroup, scale: np.ndarray, params: Callable[[int], Any], alive: dict[int, Alive]
    ) -> Stats:
        """The statistics of one stream at a group; experts' Grams some at a time where memory wants it."""
        size = expert_grams.at_a_time(group)

        def of(start: int, experts: int | None) -> Stats:
            def run(i: int) -> list[Stats]:
                if i not in alive:
                    return [self._programs[i].no_tap(number, experts)]
                given = params(i), self._pool.place(i, jax.device_put(alive[i])), self._pool.place(i, scale)
                return [self._programs[i].tap(number, *given, start, experts=experts)]

            return self._fitted(self._sum(run))

        if size is None:
            return of(0, None)
        stats = of(0, 0)
        return ExpertStats(
            **vars(stats), expert_grams=ExpertGrams(stats.gram, size, lambda start: of(start, size).gram)
        )

    def _fitted(self, sums: dict[int, Stats]) -> Stats:
        """The sum of all that is not kept out."""
        stats: Stats = _total([s for fold, s in sums.items() if fold != folds.KEPT_OUT])
        return stats

    def _sum(self, run: Callable[[int], Any]) -> dict[int, Any]:
        """What ``run`` gives for each batch and its folds, added up in the order of the batches, by fold."""
        sums: dict[int, Any] = {}
        pool, count = self._pool, len(self._folds)
        for first in range(0, count, pool.size):
            some = range(first, min(first + pool.size, count))

            def of_round(i: int, first: int = first) -> Any:
                return run(first + i)

            for i, every in zip(some, pool.map(len(some), of_round), strict=True):
                of = [fold for fold, _ in self._spans(i)] if len(every) > 1 else [self._folds[i]]
                for fold, one in zip(of, every, strict=True):
                    one = jax.device_put(one, pool.local[0]) if pool.devices else one
                    sums[fold] = _add_to(sums[fold], one) if fold in sums else one
        return sums


def _total(sums: Sequence[Any]) -> Any:
    """Of trees of arrays that are kept."""
    if len(sums) == 1:
        return sums[0]
    # A copy, so that it may be added to.
    first = jax.tree.map(lambda a: jax.device_put(np.array(a), getattr(a, "sharding", None)), sums[0])
    return functools.reduce(_add_to, sums[1:], first)


# In the memory of the former.
_add_to = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
