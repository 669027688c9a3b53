"""All batches through a block of the float model, once: sums over the tokens at its groups, and what comes out."""

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.calibration import calibration, expert_grams
from awq_jax.calibration.accumulate import Accumulator, ByGroup
from awq_jax.calibration.calibration import Fetch, Stats, Wanted
from awq_jax.calibration.expert_grams import ExpertGrams, ExpertStats
from awq_jax.devices.pool import Pool
from awq_jax.pack import Array
from awq_jax.plan.plan import ScaleGroup
from awq_jax.stream import folds
from awq_jax.stream.decoder_blocks import EMBED, HEAD, REST, Chain, DecoderBlock, Leaves
from awq_jax.stream.hidden_states import Hidden

# (parameters, what goes in, the first expert wanted) -> what comes out if it is kept, and statistics by group
Program = Callable[[Leaves, jax.Array, np.int32], tuple[jax.Array | None, ByGroup]]


class Seen(NamedTuple):
    """Statistics of a block's groups.

    Attributes:
      fitted: of the tokens that groups are rounded for.
      kept: of those that nothing is fitted to; None where groups are not judged, or by something else.
    """

    fitted: Fetch
    kept: Fetch | None = None


class Passed(NamedTuple):
    """What a pass gave.

    Attributes:
      fitted: sums over the batches that are fitted to.
      kept: over those kept out, without experts'; None if there are none.
      dtype: of what came out, "" if this process has no batch or it is not kept.
    """

    fitted: Accumulator
    kept: Accumulator | None
    dtype: str


class OnePass:
    """What passes through the blocks of a decoder need.

    Args:
      chain: its blocks.
      pool: devices that share the work. Batch ``i`` is the work of device ``i`` modulo their number, and its hidden
        states stay on the host of that device's process.
      judged: keep the sequences apart that are kept out (see `awq_jax.stream.folds`); False: fit to all.

    Attributes:
      collecting: seconds spent on Grams of experts that do not fit into memory at once, when they were asked for.
    """

    def __init__(self, chain: Chain, pool: Pool, *, judged: bool) -> None:
        self._chain, self._pool, self._judged = chain, pool, judged
        self._programs: dict[Hashable, Program] = {}
        self.collecting = 0.0

    def calibrate(
        self, block: DecoderBlock, groups: Sequence[ScaleGroup], leaves: Leaves, hidden: Hidden, activations: str | None
    ) -> tuple[Seen, str | None]:
        """Send all batches through a block, and sum up the statistics of ``groups``.

        If the Grams of its experts do not fit into memory at once (`awq_jax.calibration.expert_grams`), what comes out
        of the block is left to `on`: all goes through the block again whenever other experts are asked for.

        Args:
          groups: with names within the block.
          leaves: the block's float parameters.
          hidden: what goes in.
          activations: the dtype in which it does.

        Returns:
          What brings together the sums of a group by its full name, and the dtype of what came out; None for nothing.

        Raises:
          ProcessError: another process has ended.
        """
        sizes = experts_at_a_time(groups)
        if block.kind == REST or (block.kind == HEAD and not groups) or not hidden.batches:
            return Seen(lambda name: None), None
        wanted = [Wanted(g, 0 if g.name in sizes else None) for g in groups]
        sums, kept, dtype = self._pass(block, leaves, hidden, activations, wanted, keep=not sizes)

        def of_kept(name: str) -> Stats | None:
            return kept.fetch(name) if kept is not None and name in kept.names else None

        judged = of_kept if kept is not None else None
        if not sizes:
            return Seen(sums.fetch, judged), dtype
        stats: dict[str, Stats] = {}
        for group in groups:
            name, size = block.prefix + group.name, sizes.get(group.name)
            stats[name] = layer = sums.fetch(name)
            if size is not None:
                collect = self._collector(block, leaves, hidden, activations, Wanted(group, size))
                stats[name] = ExpertStats(**vars(layer), expert_grams=ExpertGrams(layer.gram, size, collect))
        return Seen(stats.get, judged), dtype

    def on(self, block: DecoderBlock, leaves: Leaves, hidden: Hidden, activations: str | None) -> str:
        """Send all batches through a block without statistics; the dtype of what came out."""
        return self._pass(block, leaves, hidden, activations, [], keep=True).dtype

    def _collector(
        self, block: DecoderBlock, leaves: Leaves, hidden: Hidden, activations: str | None, wanted: Wanted
    ) -> Callable[[int], Array]:
        """Sends all batches through a block for the Grams of as many experts as ``wanted`` says, from a number on."""

        def collect(start: int) -> Array:
            begun = time.perf_counter()
            sums = self._pass(block, leaves, hidden, activations, [wanted], keep=False, start=start).fitted
            self.collecting += time.perf_counter() - begun
            return sums.fetch(block.prefix + wanted.group.name).gram

        return collect

    def _pass(
        self,
        block: DecoderBlock,
        leaves: Leaves,
        hidden: Hidden,
        activations: str | None,
        wanted: Sequence[Wanted],
        *,
        keep: bool,
        start: int = 0,
    ) -> Passed:
        """All batches through a block, once; ``keep``: what comes out goes into the next block."""
        program, pool = self._program(block, wanted, keep), self._pool
        copies = pool.spread(dict(leaves))
        fitted, alone = self._fitted(hidden)
        judged = [w for w in wanted if not w.group.batch]
        sums = Accumulator(pool, wanted, block.prefix)
        kept = Accumulator(pool, judged, block.prefix) if fitted < hidden.batches or alone else None
        dtype = ""
        for first in range(0, hidden.batches, pool.size):
            count = min(pool.size, hidden.batches - first)
            made, halves = {}, {}
            for i in range(first, first + count):
                if pool.mine(i):
                    x = hidden.get(i)
                    if block.kind != EMBED:
                        x = x.astype(activations or x.dtype, copy=False)
                    made[i] = program(copies(i), pool.place(i, jax.device_put(x)), np.int32(start))
                    if alone and wanted:  # a token does not see those after it
                        half = pool.place(i, jax.device_put(x[:, : -(-x.shape[1] // 2)]))
                        halves[i] = program(copies(i), half, np.int32(start))[1]
            stats = {i: new for i, (_, new) in made.items()}
            # Waiting in each round bounds what is in flight to a batch a device.
            if first < fitted:
                sums.add(halves if alone else stats, first, min(count, fitted - first))
            if kept is not None and (alone or first + count > fitted):
                rest = {i: jax.tree.map(jnp.subtract, stats[i], half) for i, half in halves.items()} if alone else stats
                some = {i: {w.group.name: new[w.group.name] for w in judged} for i, new in rest.items()}
                kept.add(some, first, count, skip=0 if alone else max(0, fitted - first))
                del rest, some
            out = {i: y for i, (y, _) in made.items() if y is not None}
            del made, stats, halves  # no statistics of this round are there during the next
            for i, y in out.items():
                dtype = y.dtype.name
                hidden.put(i, np.asarray(y))
        if keep:
            hidden.advance()
        return Passed(sums, kept, dtype)

    def _fitted(self, hidden: Hidden) -> tuple[int, bool]:
        """How many batches, the first ones, are fitted to; and whether it is half of a sequence that is alone."""
        if not self._judged:
            return hidden.batches, False
        fold_of = folds.of_batches([rows for rows, _ in hidden.shapes], 1)
        rows, tokens = hidden.shapes[0]
        return fold_of.count(0), len(fold_of) == rows == 1 < tokens

    def _program(self, block: DecoderBlock, wanted: Sequence[Wanted], keep: bool) -> Program:
        """Compiled once for each kind of block (and choice of weights)."""
        key = (block.kind, tuple((w.group.name, w.experts) for w in wanted), keep)
        if key not in self._programs:
            collect = calibration.collector(self._chain.apply(block), wanted)
            keep = keep and block.kind != HEAD

            # Sums are another program's work: it must not depend on them how this one rounds.
            def run(leaves: Leaves, x: jax.Array, start: np.int32) -> tuple[jax.Array | None, ByGroup]:
                y, new = collect(leaves, (x,), {}, start)
                return y if keep else None, jax.tree.map(lambda a: a[None], new)

            self._programs[key] = jax.jit(run)
        return self._programs[key]


def experts_at_a_time(groups: Iterable[ScaleGroup]) -> dict[str, int]:
    """Groups whose experts' Grams do not all fit into memory, by name: how many at a time."""
    sizes = {g.name: expert_grams.at_a_time(g) for g in groups}
    return {name: n for name, n in sizes.items() if n is not None}
