"""Quantization one block at a time: the statistics of a block, its scales, its packed weights, then the next.

`awq_jax.serve.model.Model.quantize` goes through blocks that are in memory, `awq_jax.stream.run` through those of
a checkpoint: same programs on the same batches, hence the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from awq_jax import paths
from awq_jax.calibration import calibration, expert_grams
from awq_jax.calibration.accumulate import Accumulator
from awq_jax.calibration.calibration import Array, Fetch, Statistics, Stats, Wanted
from awq_jax.calibration.expert_grams import ExpertGrams, ExpertStats
from awq_jax.config import AwqConfig
from awq_jax.devices.pool import HERE, Pool
from awq_jax.errors import CalibrationError, ConfigError
from awq_jax.models import ModelConfig
from awq_jax.plan.plan import Group, Plan
from awq_jax.plan.verify import verify
from awq_jax.quantizer import quantize as quantizer
from awq_jax.quantizer.targets import select
from awq_jax.report import LayerReport, Report
from awq_jax.stream.decoder_blocks import EMBED, HEAD, REST, Block, Chain, moved
from awq_jax.stream.hidden_states import Hidden, InMemory

PROBE = 64  # tokens on which a plan is proven
BATCH_TOKENS = {"cpu": 512}  # by backend; what bounds the memory of activations
BATCH_TOKENS_ELSEWHERE = 8192


@dataclasses.dataclass(frozen=True)
class Done:
    """What became of a block.

    Attributes:
      block: which.
      leaves: its own parameters by full path: packed, rescaled, or as they were.
      rows: of the packed ones.
      seconds: phase -> wall seconds.
      bytes_before, bytes_after: of its own parameters.
    """

    block: Block
    leaves: dict[str, Any]
    rows: list[LayerReport]
    seconds: dict[str, float]
    bytes_before: int
    bytes_after: int


class Session:
    """A quantization in progress.

    Args:
      config: architecture.
      settings: what to quantize to.
      pool: devices that share the work; the result does not depend on their number.

    Attributes:
      chain: the blocks.
      plan: scale groups of the whole model, as discovered.
      skipped: path -> reason, of matmul weights left float.
      refused: kind of block -> name of a group within it -> why its scale is not absorbed after all.
      activations: dtype of hidden states, once there are any.
      asked_again: seconds spent on the statistics of experts when they were asked for, within `quantize`.

    Raises:
      ShapeError: listing the weights that the group size does not divide.
      ConfigError: nothing would be quantized.
    """

    def __init__(self, config: ModelConfig, settings: AwqConfig, pool: Pool = HERE) -> None:
        self.chain, self.settings, self.pool = Chain(config), settings, pool
        self.plan = self.chain.plan()
        self.targets, self.skipped = select(self.plan, settings)
        if not self.targets:
            why = "; ".join(f"{path}: {reason}" for path, reason in self.skipped.items())
            raise ConfigError(f"nothing would be quantized: {why or 'the model has no matmul'}")
        self.refused: dict[Hashable, dict[str, str]] = {}
        self._groups: dict[str, list[Group]] = {}
        for group in self.plan.groups:
            self._groups.setdefault(self._owner(group.name), []).append(group)
        self._steps: dict[Hashable, Callable[..., Any]] = {}
        self.activations: str | None = None
        self.asked_again = 0.0

    @property
    def blocks(self) -> list[Block]:
        """In the order that tokens go through them."""
        return self.chain.blocks

    def read_by(self, block: Block) -> list[str]:
        """The parameters of a block that are needed for it: all unless nothing is to be calibrated there."""
        return list(block.leaves if block.kind not in (HEAD, REST) or self.work(block) else block.owned)

    def restore(self, block: Block, refused: dict[str, str] | None, activations: str | None) -> None:
        """Take over what an earlier run found out when it did ``block``."""
        if refused is not None:
            self.refused[block.kind] = refused
        self.activations = activations

    def run(
        self, blocks: Iterable[Block], read: Callable[[Block], Mapping[str, Any]], hidden: Hidden, batches: int
    ) -> Iterator[Done]:
        """Calibrate and quantize ``blocks`` one after another.

        Args:
          blocks: a tail of `blocks`.
          read: a block's float parameters by path within it. They are dropped before the next are read.
          hidden: what goes into the first of ``blocks``.
          batches: how many there are.
        """
        for block in blocks:
            start = time.perf_counter()
            leaves = read(block)
            loaded = time.perf_counter()
            fetch = self.calibrate(block, leaves, hidden, batches)
            calibrated = time.perf_counter() - loaded
            done = self.quantize(block, leaves, fetch)
            quantized = time.perf_counter()
            if self.grams_in_parts(block):
                self.pass_on(block, leaves, hidden, batches)
                calibrated += time.perf_counter() - quantized
            del leaves, fetch
            seconds = {"load": loaded - start, **done.seconds, "calibrate": calibrated + done.seconds["calibrate"]}
            yield dataclasses.replace(done, seconds=seconds)
            del done

    def calibrate(self, block: Block, leaves: Mapping[str, Any], hidden: Hidden, batches: int) -> Fetch:
        """Send all batches through a block, and sum up the statistics of its groups.

        Batch ``i`` is the work of device ``i`` modulo their number, and its hidden states stay on the host of
        that device's process. If the Grams of its experts do not fit into memory at once
        (`awq_jax.calibration.expert_grams`), what comes out of the block is left to `pass_on`: all goes through
        the block again whenever other experts are asked for.

        Returns:
          What brings together the sums of a group of this block, by its full name.

        Raises:
          ProcessError: another process has ended.
        """
        parts = self.grams_in_parts(block)
        groups = [_within(g, block) for g, _ in self.work(block)]
        if block.kind == REST or (block.kind == HEAD and not groups):
            return lambda name: None
        wanted = [Wanted(g, 0 if g.name in parts else None) for g in groups]
        sums = self._pass(block, leaves, hidden, batches, wanted, keep=not parts)
        if not parts:
            return sums.fetch
        whole = (name for name in sums.names if name[len(block.prefix) :] not in parts)
        stats: dict[str, Statistics] = {name: sums.fetch(name) for name in whole}
        for group in groups:
            if group.name in parts:
                collect = functools.partial(
                    self._some_experts, block, leaves, hidden, batches, Wanted(group, parts[group.name])
                )
                layer = sums.fetch(block.prefix + group.name)
                grams = ExpertGrams(layer.gram, parts[group.name], collect)
                stats[block.prefix + group.name] = ExpertStats(grams, layer.abs, layer.count, layer.dropped)
        return stats.get

    def pass_on(self, block: Block, leaves: Mapping[str, Any], hidden: Hidden, batches: int) -> None:
        """Send all batches through a block that is quantized already, as `run` would.

        Statistics and all, as another program might round otherwise.
        """
        if self.grams_in_parts(block):
            self._pass(block, leaves, hidden, batches, [], keep=True)
        else:
            self.calibrate(block, leaves, hidden, batches)

    def grams_in_parts(self, block: Block) -> dict[str, int]:
        """The groups whose experts' Grams are collected some at a time, by name within the block, and how many."""
        sizes = {g.name[len(block.prefix) :]: expert_grams.at_a_time(g) for g, _ in self.work(block)}
        return {name: n for name, n in sizes.items() if n is not None}

    def _some_experts(
        self, block: Block, leaves: Mapping[str, Any], hidden: Hidden, batches: int, wanted: Wanted, start: int
    ) -> Array:
        begun = time.perf_counter()
        sums = self._pass(block, leaves, hidden, batches, [wanted], keep=False, start=start)
        self.asked_again += time.perf_counter() - begun
        return sums.fetch(block.prefix + wanted.group.name).gram

    def _pass(
        self,
        block: Block,
        leaves: Mapping[str, Any],
        hidden: Hidden,
        batches: int,
        wanted: Sequence[Wanted],
        *,
        keep: bool,
        start: int = 0,
    ) -> Accumulator:
        """All batches through a block, once; ``keep``: what comes out goes into the next block."""
        step, pool = self._step(block, wanted, keep), self.pool
        copies = pool.spread(dict(leaves))
        sums, seen = Accumulator(pool, wanted, block.prefix), ""
        for first in range(0, batches, pool.size):
            count = min(pool.size, batches - first)
            made = {}
            for i in range(first, first + count):
                if pool.mine(i):
                    x = hidden.get(i)
                    if block.kind != EMBED:
                        x = x.astype(self.activations or x.dtype, copy=False)
                    made[i] = step(copies(i), pool.place(i, jnp.asarray(x)), np.int32(start))
            # Waiting in each round bounds what is in flight to a batch a device.
            sums.add({i: stats for i, (_, stats) in made.items()}, first, count)
            out = {i: y for i, (y, _) in made.items() if y is not None}
            del made  # no statistics of this round are there during the next
            for i, y in out.items():
                seen = y.dtype.name
                hidden.put(i, np.asarray(y))
        if keep:
            hidden.turn()
        # A process without a batch learns it from the others.
        self.activations = next(filter(None, pool.meet(seen)), self.activations)
        return sums

    def quantize(self, block: Block, leaves: Mapping[str, Any], fetch: Fetch) -> Done:
        """Pack a block's weights; ``fetch`` from `calibrate`, whose sums are used up.

        Raises:
          WeightError: a weight holds NaN or inf.
        """
        quantizer.check_finite({block.prefix + p: leaf for p, leaf in leaves.items()})
        start = time.perf_counter()
        self._prove(block, leaves)
        proven = time.perf_counter()
        work = self.work(block)
        plan = Plan(tuple(g for g, _ in work))
        own = {block.prefix + p: leaves[p] for p in block.owned}
        done = quantizer.quantize_groups(plan, work, own, fetch, self.settings, pool=self.pool, consume=True)
        seconds = {"calibrate": proven - start, **done.seconds}
        return Done(block, done.leaves, done.rows, seconds, paths.nbytes(own), paths.nbytes(done.leaves))

    def work(self, block: Block) -> quantizer.Work:
        """The groups of a block that have weights to be quantized, with full paths."""
        refused = self.refused.get(block.kind, {})
        plan = Plan(tuple(_refuse(g, refused.get(g.name[len(block.prefix) :])) for g in self._all(block)))
        return quantizer.with_targets(plan, self.targets)

    def _all(self, block: Block) -> list[Group]:
        return self._groups.get(block.name, [])

    def _owner(self, path: str) -> str:
        """The name of the block that has a site."""
        top, _, rest = path.partition("/")
        if top == "layers":
            return f"{top}/{rest.partition('/')[0]}"
        return EMBED if path in self.blocks[0].leaves else HEAD

    def _step(self, block: Block, wanted: Sequence[Wanted], keep: bool) -> Callable[..., Any]:
        """Compiled once for each kind of block (and choice of weights)."""
        key = (block.kind, tuple((w.group.name, w.experts) for w in wanted), keep)
        if key not in self._steps:
            collect = calibration.collector(self.chain.apply(block), wanted)
            keep = keep and block.kind != HEAD

            # Sums are another program's work: it must not depend on them how this one rounds.
            def run(leaves: Any, x: jax.Array, start: jax.Array) -> tuple[Any, dict[str, Stats]]:
                y, new = collect(leaves, (x,), {}, start)
                return y if keep else None, jax.tree.map(lambda a: a[None], new)

            self._steps[key] = jax.jit(run)
        return self._steps[key]

    def _prove(self, block: Block, leaves: Mapping[str, Any]) -> None:
        """See on the first block of each kind that its plan keeps the output what it is."""
        if block.kind in self.refused or not self.work(block):
            return
        plan = Plan(tuple(_within(g, block) for g in self._all(block)))
        config = self.chain.config
        rng = np.random.default_rng(0)
        length = min(PROBE, config.max_length)
        probe: Any = rng.integers(0, config.vocab_size, (1, length)).astype(np.int32)
        if block.kind != EMBED:
            # Normal numbers rather than real hidden states: a few of those can be so large that they hide the rest.
            probe = jnp.asarray(rng.standard_normal((1, length, config.hidden_size)), self.activations or jnp.float32)
        proven = verify(plan, self.chain.apply(block), dict(leaves), probe)
        refused = {
            new.name: new.reason
            for old, new in zip(plan.groups, proven.groups, strict=True)
            if old.absorbers and not new.absorbers
        }
        self.refused[block.kind] = json.loads(self.pool.meet(json.dumps(refused))[0])


def batched(tokens: np.ndarray, vocab_size: int, batch_size: int | None = None) -> list[np.ndarray]:
    """Calibration tokens ``[S, T]`` as batches of ``batch_size`` rows, by default as many as make 512 tokens on
    a CPU and 8192 elsewhere.

    Raises:
      CalibrationError: if a token lies outside the vocabulary.
    """
    tokens = np.asarray(tokens, np.int32)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise CalibrationError(f"calibration tokens lie outside the vocabulary of {vocab_size}")
    most = BATCH_TOKENS.get(jax.default_backend(), BATCH_TOKENS_ELSEWHERE)
    rows = batch_size or max(1, most // tokens.shape[1])
    return [tokens[i : i + rows] for i in range(0, len(tokens), rows)]


def _within(group: Group, block: Block) -> Group:
    """A group with paths as they are within its block."""
    return moved(group, block.prefix, "")


def _refuse(group: Group, why: str | None) -> Group:
    return group if why is None else dataclasses.replace(group, absorbers=(), shared_channels=None, reason=why)


def in_memory(
    params: Any, session: Session, batches: Sequence[np.ndarray], progress: bool = True
) -> tuple[Any, Report]:
    """Quantize a decoder that is in memory.

    Args:
      params: its float parameters.
      session: fresh.
      batches: calibration tokens, int32 ``[B, T]`` each.
      progress: show a progress bar on stderr.

    Returns:
      The parameters, packed where they are quantized, and what was done.
    """
    floats = paths.flatten(params)
    leaves: dict[str, Any] = {}
    rows: list[LayerReport] = []
    seconds = dict.fromkeys(("calibrate", "search", "round"), 0.0)

    def read(block: Block) -> dict[str, Any]:
        return {path: floats[block.prefix + path] for path in session.read_by(block)}

    bar = tqdm(session.blocks, desc="quantize", unit="block", disable=not progress)
    for done in session.run(bar, read, InMemory(batches), len(batches)):
        leaves |= done.leaves
        rows += done.rows
        for phase in seconds:
            seconds[phase] += done.seconds[phase]
    out = paths.map_with_path(lambda path, _: leaves[path], params)
    tokens = sum(b.size for b in batches)
    sizes = paths.nbytes(params), paths.nbytes(out)
    return out, Report(session.settings.to_dict(), rows, session.skipped, tokens, seconds, *sizes)
