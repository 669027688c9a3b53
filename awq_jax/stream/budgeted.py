"""Bits for the weights of a decoder (see `awq_jax.allocate`), measured block by block, forth and back."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from awq_jax import paths
from awq_jax.algorithm.methods import METHODS
from awq_jax.budget import losses, sensitivity
from awq_jax.budget.allocate import Allocation, Measured, best, candidates
from awq_jax.config import AwqConfig, Budget
from awq_jax.convert.files.shards import write_json
from awq_jax.errors import ConfigError
from awq_jax.progress import Progress, bar
from awq_jax.quantizer import quantize as quantizer
from awq_jax.stream.decoder_blocks import (
    EMBED,
    HEAD,
    REST,
    DecoderBlock,
    Leaves,
    Read,
    from_checkpoint,
    from_memory,
    owner,
)
from awq_jax.stream.hidden_states import InMemory
from awq_jax.stream.job import ALLOCATION, Job
from awq_jax.stream.session import Session
from awq_jax.trace.probes import Place, Sums, probed

TOKENS = 2048  # that weights are told apart by: as many were enough for stories15M
# (parameters, what goes in, what comes back from the block after) -> squares, and what goes back to the one before
Pull = Callable[[Leaves, jax.Array, jax.Array], tuple[Sums, jax.Array]]


def allocate(
    session: Session,
    budget: Budget,
    read: Read,
    batches: Sequence[np.ndarray],
    progress: Progress = True,
) -> Allocation:
    """The settings of all weights of a decoder.

    Memory: a block, what goes into each block for `TOKENS` tokens, and one step of a block's gradient.

    Args:
      session: whose weights; the settings are those of its own where nothing is chosen.
      budget: what is asked.
      read: a block's float parameters by path within it, all that it reads. It is called twice for each block.
      batches: calibration tokens, int32 ``[B, T]`` each: the first ones are used, and each whole.

    Raises:
      ConfigError: the method needs no statistics, or the budget is out of reach.
      WeightError: a weight holds NaN or inf.
    """
    if not METHODS[session.settings.method].needs_statistics:
        raise ConfigError(f'target_bits needs a method with statistics; method is "{session.settings.method}"')
    few = _few(batches)
    tried = candidates(session.targets.values(), session.settings, budget)
    errors: dict[str, np.ndarray] = {}
    places = sensitivity.places_of(session.plan, {t.site.path for t in session.targets.values()})
    entered: list[list[np.ndarray]] = []
    # One device does all of it: there is little.
    shared = session.pool.size > 1 or session.pool.team is not None
    alone = Session(session.chain.config, session.settings) if shared else session
    blocks = [b for b in alone.blocks if b.kind != REST]
    with bar(progress, "measure", "block", 2 * len(blocks)) as shown:
        hidden = InMemory(few)
        for block in blocks:
            leaves = read(block)
            quantizer.check_finite({block.prefix + p: leaf for p, leaf in leaves.items()})
            entered.append([hidden.get(i) for i in range(hidden.batches)])
            seen = alone.calibrate(block, leaves, hidden)
            own = {block.prefix + p: leaf for p, leaf in leaves.items()}
            for group, mine in alone.work(block):
                stats = seen.fitted(group.name)
                assert stats is not None
                errors |= losses.squared_errors(mine, own, stats, session.settings, tried)
            if alone.experts_at_a_time(block):
                alone.pass_on(block, leaves, hidden)
            del leaves, own, seen
            shown.update()
        squares = _back(alone, blocks, read, entered, places, shown.update)
    measured = Measured(errors, squares, sum(b.size for b in few))
    found = best(session.plan, session.targets, session.settings, budget, tried, measured)
    if progress is True:
        print(found, file=sys.stderr)
    return found


def in_memory(
    session: Session, budget: Budget, params: nnx.State, batches: Sequence[np.ndarray], progress: Progress = True
) -> Allocation:
    """`allocate` for a decoder whose float parameters are ``params``."""
    return allocate(session, budget, from_memory(paths.flatten(params)), batches, progress)


def settle(job: Job, progress: Progress = True) -> None:
    """Choose the settings of a job that has a budget, or take those that an earlier run of it has chosen."""
    session, budget, path = job.session, job.options.budget, job.work / ALLOCATION
    assert budget is not None
    chosen = ""
    if not session.pool.rank:
        if not path.is_file():
            found = allocate(session, budget, from_checkpoint(job.weights), job.batches, progress)
            part = path.with_name(path.name + ".part")
            write_json(part, found.config.to_dict())
            part.replace(path)
        chosen = path.read_text(encoding="utf-8")
    config = AwqConfig.from_dict(json.loads(session.pool.meet(chosen)[0]))
    job.session = Session(session.chain.config, config, session.pool)


def _few(batches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The first batches, of `TOKENS` tokens or a batch more."""
    out: list[np.ndarray] = []
    for batch in batches:
        if sum(b.size for b in out) >= TOKENS:
            break
        out.append(batch)
    return out


def _back(
    session: Session,
    blocks: Sequence[DecoderBlock],
    read: Read,
    entered: list[list[np.ndarray]],
    places: Sequence[Place],
    progress: Callable[[], object],
) -> dict[Place, float]:
    """Squared gradients at ``places``: those of the last block first."""
    programs: dict[tuple[Hashable, tuple[Place, ...]], Pull] = {}
    totals = dict.fromkeys(places, 0.0)
    coming: list[np.ndarray | None] = [None] * len(entered[0])
    for block in reversed(blocks):
        here = [p for p in places if owner(p.path) == block.name]
        if block.kind == EMBED and not here:
            progress()
            continue
        mine = tuple(Place(p.path.removeprefix(block.prefix), p.part) for p in here)
        key = block.kind, mine
        if key not in programs:
            programs[key] = _pull(session, block, mine)
        leaves = dict(read(block))
        for i, x in enumerate(entered.pop()):
            given = jnp.asarray(x if block.kind == EMBED else x.astype(session.activations or x.dtype, copy=False))
            back = coming[i]
            after = jax.random.fold_in(jax.random.key(sensitivity.SEED), i) if back is None else jnp.asarray(back)
            sums, out = programs[key](leaves, given, after)
            coming[i] = np.asarray(out)
            for whole, own in zip(here, mine, strict=True):
                totals[whole] += float(sums[own])
        del leaves
        progress()
    return totals


def _pull(session: Session, block: DecoderBlock, places: Sequence[Place]) -> Pull:
    """The program that takes gradients back through blocks of one kind; the head begins with labels that it draws."""
    run = probed(session.chain.apply(block))
    zeros = sensitivity.nothing(places)

    @jax.jit
    def pull(leaves: Leaves, x: jax.Array, after: jax.Array) -> tuple[Sums, jax.Array]:
        if block.kind == EMBED:
            out, back = jax.vjp(lambda sums: run(sums, leaves, x), zeros)
            return back(after.astype(out.dtype))[0], jnp.zeros(())
        out, back = jax.vjp(lambda sums, x: run(sums, leaves, x), zeros, x)
        given = sensitivity.drawn(out, after) if block.kind == HEAD else after.astype(out.dtype)
        sums, before = back(given)
        return sums, before

    return pull
