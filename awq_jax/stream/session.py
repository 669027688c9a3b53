"""Quantization one block at a time: the statistics of a block, its scales, its packed weights, then the next.

`awq_jax.serve.model.Model.quantize` goes through blocks that are in memory (`Session.run_in_memory`),
`awq_jax.stream.run` through those of a checkpoint: same programs on the same batches, hence the same bits.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
from flax import nnx

from awq_jax import paths
from awq_jax.algorithm.methods import METHODS
from awq_jax.config import AwqConfig
from awq_jax.convert.config_json import JsonObject
from awq_jax.devices.pool import HERE, Pool
from awq_jax.models.config import ModelConfig
from awq_jax.plan import folded
from awq_jax.plan.plan import Plan, ScaleGroup
from awq_jax.progress import Progress, through
from awq_jax.qtensor import Weight
from awq_jax.quantizer import advice, kept_out
from awq_jax.quantizer import quantize as quantizer
from awq_jax.quantizer.targets import select
from awq_jax.report import LayerReport, Report
from awq_jax.stream import folds, proof
from awq_jax.stream.decoder_blocks import (
    HEAD,
    REST,
    Chain,
    DecoderBlock,
    Leaves,
    owner,
    refuse,
    within,
)
from awq_jax.stream.hidden_states import Hidden, InMemory
from awq_jax.stream.lockstep import Lockstep
from awq_jax.stream.one_pass import OnePass, Seen, experts_at_a_time
from awq_jax.stream.two_streams import TwoStreams

Note: TypeAlias = JsonObject  # of a block: kept in the manifest of an unfinished run


@dataclasses.dataclass(frozen=True)
class Done:
    """What became of a block.

    Attributes:
      block: which.
      leaves: its own parameters by full path: packed, rescaled, or as they were.
      rows: of the packed ones.
      seconds: phase -> wall seconds.
      bytes_before, bytes_after: of its own parameters.
      scales: group -> what was folded, see `awq_jax.plan.fold.Folder`.
    """

    block: DecoderBlock
    leaves: dict[str, Weight]
    rows: list[LayerReport]
    seconds: dict[str, float]
    bytes_before: int
    bytes_after: int
    scales: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Session:
    """A quantization in progress.

    Args:
      config: architecture.
      settings: what to quantize to.
      pool: devices that share the work; the result does not depend on their number.

    Attributes:
      chain: the decoder as blocks.
      blocks: in the order that tokens go through them.
      plan: scale groups of the whole model, as discovered.
      skipped: path -> reason, of matmul weights left float.
      refused: kind of block -> name of a group within it -> why its scale is not absorbed after all.
      activations: dtype of hidden states, once there are any.

    Raises:
      ShapeError: listing the weights that the group size does not divide.
      ConfigError: a pattern of the settings has no effect, or nothing would be quantized.
    """

    def __init__(self, config: ModelConfig, settings: AwqConfig, pool: Pool = HERE) -> None:
        self.chain, self.settings, self.pool = Chain(config), settings, pool
        self.blocks, self.plan = self.chain.blocks, self.chain.plan()
        parameters = [b.prefix + path for b in self.blocks for path in b.leaves]
        self.targets, self.skipped = select(self.plan, settings, parameters)
        self.refused: dict[Hashable, dict[str, str]] = {}
        self._groups: dict[str, list[ScaleGroup]] = {}
        for group in self.plan.groups:
            self._groups.setdefault(owner(group.name), []).append(group)
        self._once = OnePass(self.chain, pool, judged=METHODS[settings.method].needs_statistics)
        self._streams = TwoStreams(self.chain, pool)
        self.activations: str | None = None

    @property
    def collecting(self) -> float:
        """Seconds spent within `quantize` on Grams of experts that do not fit into memory at once."""
        return self._once.collecting

    def read_by(self, block: DecoderBlock) -> list[str]:
        """The parameters of a block that are needed for it: all unless nothing is to be calibrated there."""
        return list(block.leaves if block.kind not in (HEAD, REST) or self.work(block) else block.owned)

    def restore(self, block: DecoderBlock, note: Note) -> None:
        """Take over what an earlier run found out when it did ``block``: its `note`."""
        if note["refused"] is not None:
            self.refused[block.kind] = note["refused"]
        self.activations = note["activations"]

    @property
    def sequential(self) -> bool:
        """Groups are rounded on the quantized stream."""
        return self.settings.sequential and METHODS[self.settings.method].needs_statistics

    def run(
        self,
        blocks: Iterable[DecoderBlock],
        read: Callable[[DecoderBlock], Leaves],
        hidden: Hidden,
        quantized: Hidden | None = None,
    ) -> Iterator[Done]:
        """Calibrate and quantize ``blocks`` one after another.

        Args:
          blocks: a tail of `blocks`.
          read: a block's float parameters by path within it. They are dropped before the next are read.
          hidden: what goes into the first of ``blocks``.
          quantized: what does in the quantized model, if the session is `sequential`.
        """
        clock = time.perf_counter
        for block in blocks:
            start, leaves, loaded = clock(), read(block), clock()
            steps = None if quantized is None else self._enter(block, leaves, hidden, quantized)
            seen = self.calibrate(block, leaves, hidden) if steps is None else Seen(steps.calibrate())
            calibrated = clock() - loaded
            done = self.quantize(block, leaves, seen, steps)
            rounded = clock()
            if steps is None and hidden.batches and self.experts_at_a_time(block):
                self.pass_on(block, leaves, hidden)
            if quantized is not None:
                self._see(self._streams.leave(block, steps, hidden, quantized))
            calibrated += clock() - rounded
            del leaves, seen, steps
            seconds = {"load": loaded - start, **done.seconds, "calibrate": calibrated + done.seconds["calibrate"]}
            yield dataclasses.replace(done, seconds=seconds)
            del done

    def run_in_memory(
        self, params: nnx.State, batches: Sequence[np.ndarray], progress: Progress = True
    ) -> tuple[nnx.State, Report]:
        """Calibrate and quantize all blocks of a decoder that is in memory.

        Args:
          params: its float parameters.
          batches: calibration tokens, int32 ``[B, T]`` each.
          progress: show a progress bar on stderr, or a function (see `awq_jax.progress`).

        Returns:
          The parameters, packed where they are quantized, and what was done.
        """
        floats = paths.flatten(params)
        leaves: dict[str, Weight] = {}
        notes: list[Note] = []

        def read(block: DecoderBlock) -> Leaves:
            return {path: floats[block.prefix + path] for path in self.read_by(block)}

        batches = self.arranged(batches)
        streams = [InMemory(batches) for _ in range(1 + self.sequential)]
        for done in self.run(through(self.blocks, progress, "quantize", "block"), read, *streams):
            leaves |= done.leaves
            notes.append(self.note(done))
        report = self.report(notes, batches)
        del report.seconds["load"]
        advice.warn(report)
        return paths.map_with_path(lambda path, _: leaves[path], params), report

    def arranged(self, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Calibration tokens in batches that are fitted to, or kept out, as a whole."""
        if not METHODS[self.settings.method].needs_statistics:
            return list(batches)
        return folds.apart(batches, folds.FOLDS if self.sequential else 1)

    def note(self, done: Done) -> Note:
        """What the report, and a later run, must know of a block."""
        return {
            "block": done.block.name,
            "rows": [dataclasses.asdict(r) for r in done.rows],
            "seconds": done.seconds,
            "bytes": [done.bytes_before, done.bytes_after],
            "refused": self.refused.get(done.block.kind),
            "activations": self.activations,
            "scales": folded.as_text(done.scales),
        }

    def report(self, notes: Iterable[Note], batches: Iterable[np.ndarray]) -> Report:
        """What was done with blocks, from the `note` of each, calibrated on ``batches``."""
        rows: list[LayerReport] = []
        seconds = dict.fromkeys(("load", "calibrate", "search", "round"), 0.0)
        before = after = 0
        scales: dict[str, np.ndarray] = {}
        for note in notes:
            scales |= folded.of_text(note.get("scales", {}), self.plan)
            rows += (LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in note["rows"])
            for phase, spent in note["seconds"].items():
                seconds[phase] = seconds.get(phase, 0.0) + spent
            before, after = before + note["bytes"][0], after + note["bytes"][1]
        tokens = sum(b.size for b in batches)
        made = folded.channel_scales(self.plan, scales)
        return Report(self.settings.to_dict(), rows, self.skipped, tokens, seconds, before, after, scales=made)

    def calibrate(self, block: DecoderBlock, leaves: Leaves, hidden: Hidden) -> Seen:
        """Send all batches through a block, and sum up the statistics of its groups; see `OnePass.calibrate`."""
        groups = [within(g, block) for g, _ in self.work(block)]
        seen, dtype = self._once.calibrate(block, groups, leaves, hidden, self.activations)
        if dtype is not None:
            self._see(dtype)
        return seen

    def pass_on(
        self,
        block: DecoderBlock,
        leaves: Leaves,
        hidden: Hidden,
        quantized: Hidden | None = None,
        *,
        served: Callable[[DecoderBlock], Leaves] | None = None,
    ) -> None:
        """Send all batches through a block that is quantized already, as `run` would.

        Statistics and all, as another program might round otherwise.

        Args:
          quantized: the quantized stream, if there is one.
          served: what became of a block's parameters, packed ones as floats.
        """
        steps = self._enter(block, leaves, hidden, quantized) if quantized is not None else None
        if steps is not None:
            assert served is not None
            steps.skip(served(block))
        elif self.experts_at_a_time(block):
            self._see(self._once.on(block, leaves, hidden, self.activations))
        else:
            self.calibrate(block, leaves, hidden)
        if quantized is not None:
            self._see(self._streams.leave(block, steps, hidden, quantized))

    def _see(self, dtype: str) -> None:  # a process without a batch learns it from the others
        self.activations = next(filter(None, self.pool.meet(dtype)), self.activations)

    def _enter(self, block: DecoderBlock, leaves: Leaves, hidden: Hidden, quantized: Hidden) -> Lockstep | None:
        groups = [within(g, block) for g, _ in self.work(block)]
        return self._streams.enter(block, groups, leaves, hidden, quantized, self.activations)

    def experts_at_a_time(self, block: DecoderBlock) -> dict[str, int]:
        """See `awq_jax.stream.one_pass.experts_at_a_time`."""
        return experts_at_a_time(within(g, block) for g, _ in self.work(block))

    def quantize(self, block: DecoderBlock, leaves: Leaves, seen: Seen, steps: Lockstep | None = None) -> Done:
        """Pack a block's weights; ``seen`` from `calibrate`, whose sums are used up; ``steps``: both streams.

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
        given = plan, work, own, seen.fitted, self.settings
        judge = kept_out.Judge(own, seen.fitted, seen.kept) if seen.kept is not None else None
        done = quantizer.quantize_groups(*given, pool=self.pool, consume=True, follower=steps or judge)
        seconds = {"calibrate": proven - start, **(steps.apart(done.seconds) if steps else done.seconds)}
        return Done(block, done.leaves, done.rows, seconds, paths.nbytes(own), paths.nbytes(done.leaves), done.scales)

    def work(self, block: DecoderBlock) -> quantizer.Work:
        """The groups of a block that have weights to be quantized, with full paths."""
        refused = self.refused.get(block.kind, {})
        plan = Plan(
            tuple(refuse(g, refused.get(g.name[len(block.prefix) :])) for g in self._groups.get(block.name, ()))
        )
        return quantizer.with_targets(plan, self.targets)

    def _prove(self, block: DecoderBlock, leaves: Leaves) -> None:
        """See on the first block of each kind that its plan keeps the output what it is."""
        if block.kind in self.refused or not self.work(block):
            return
        groups = [within(g, block) for g in self._groups[block.name]]
        refused = proof.refused(self.chain, block, groups, leaves, self.activations)
        self.refused[block.kind] = json.loads(self.pool.meet(json.dumps(refused))[0])
