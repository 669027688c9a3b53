"""Calibration: one streaming pass that keeps second moments of every distinct matmul input."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from awq_jax.calibration import by_expert
from awq_jax.calibration.batches import Args, Kwargs, arguments, check_batches, count_tokens, few_tokens
from awq_jax.calibration.grams import ArrayGrams, Grams
from awq_jax.calibration.in_turn import in_turn
from awq_jax.errors import CalibrationError
from awq_jax.pack import Array
from awq_jax.plan.discover import discover
from awq_jax.plan.plan import Plan, ScaleGroup
from awq_jax.plan.validate import validate
from awq_jax.plan.verify import verify
from awq_jax.progress import Progress, through
from awq_jax.trace import interpret
from awq_jax.trace.arguments import Form, split

T = TypeVar("T")

SLAB, SLAB_CHANNELS = 128, 512  # see `_in_slabs`
KEPT_OUT = "kept_out."  # before the names of fields in a file


@dataclasses.dataclass(frozen=True)
class Stats:
    """Sums over calibration tokens for one scale group (float32).

    Attributes:
      gram: ``[*scan, *batch, K, K]``: sum of ``x^T x``.
      abs: ``[*scan, *batch, K]``: sum of ``|x|``.
      count: ``[*scan, *batch]``: tokens summed.
      dropped: ``[*scan, *batch]``: tokens left out because of a NaN or inf in them.
    """

    gram: Array
    abs: Array
    count: Array
    dropped: Array

    def grams(self, group: ScaleGroup) -> Grams:
        """The Grams by instance; ``group``: whose statistics these are."""
        return ArrayGrams(self.gram, group)


jax.tree_util.register_dataclass(Stats, data_fields=["gram", "abs", "count", "dropped"], meta_fields=[])


Fetch = Callable[[str], Stats | None]
"""The sums of a group by its name, None if there are none. It may move them between devices and processes:
all processes call it for the same groups in the same order."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Statistics of a model on calibration data; all `awq_jax.quantize` needs besides the weights.

    Sums, so calibrations of the same plan can be added: ``a + b`` (batches, hosts, runs).

    Attributes:
      plan: scale groups the statistics belong to.
      stats: group name -> `Stats`, of what is fitted to.
      tokens: tokens seen, those kept out included.
      kept_out: the same of tokens that nothing is fitted to, by which the result is judged; empty if there are none.
    """

    plan: Plan
    stats: Mapping[str, Stats]
    tokens: int
    kept_out: Mapping[str, Stats] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Calibration) -> Calibration:
        """Statistics over the tokens of both.

        Raises:
          CalibrationError: if the plans differ, or only one has statistics of the model's output.
        """
        if self.plan.to_dict() != other.plan.to_dict():
            raise CalibrationError("cannot add calibrations of different plans: recalibrate both with the same plan")
        if uneven := sorted(self.stats.keys() ^ other.stats.keys()):
            raise CalibrationError(f"only one of two calibrations has statistics of {uneven[0]}: use one include_head")
        stats, kept = (_sum(a, b) for a, b in ((self.stats, other.stats), (self.kept_out, other.kept_out)))
        return Calibration(self.plan, stats, self.tokens + other.tokens, kept)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file (statistics as float32, the plan as JSON in its metadata)."""
        path = Path(path)
        tensors = {
            f"{name}:{before}{f.name}": np.asarray(getattr(s, f.name), order="C")
            for before, stats in (("", self.stats), (KEPT_OUT, self.kept_out))
            for name, s in stats.items()
            for f in dataclasses.fields(Stats)
        }
        header = {"awq_jax": json.dumps({"plan": self.plan.to_dict(), "tokens": self.tokens})}
        part = path.with_name(path.name + ".part")
        save_file(tensors, part, metadata=header)
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
          CalibrationError: if the file is truncated, or not a calibration.
        """
        try:
            with safe_open(path, "numpy") as f:
                header = json.loads((f.metadata() or {})["awq_jax"])
                plan = Plan.from_dict(header["plan"])
                names = set(f.keys())
                fields = [x.name for x in dataclasses.fields(Stats)]
                stats, kept = (
                    {
                        g.name: Stats(*(f.get_tensor(f"{g.name}:{before}{x}") for x in fields))
                        for g in plan.groups
                        if f"{g.name}:{before}gram" in names
                    }
                    for before in ("", KEPT_OUT)
                )
                return cls(plan, stats, int(header["tokens"]), kept)
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as e:
            raise CalibrationError(f"{path} is not a complete calibration file ({e}): calibrate again") from None


def calibrate(
    apply_fn: Callable[..., object],
    params: object,
    batches: Iterable[object],
    *,
    plan: Plan | None = None,
    verified: bool = False,
    include_head: bool = False,
    check: Callable[[Plan], object] | None = None,
    keep_out: bool = True,
    progress: Progress = True,
) -> Calibration:
    """Stream ``batches`` through the model once and keep `Stats` of every scale group.

    Of four batches or more, one in eight is kept from all fitting: by its sums `awq_jax.quantize` judges each group
    (not those of experts with an input of their own). So pass many small batches rather than a few large ones.

    Memory: the parameters, two batches, and one float32 ``[K, K]`` per distinct matmul input (two with ``keep_out``).

    Args:
      apply_fn: ``apply_fn(params, *args, **kwargs)``, e.g. ``model.apply`` of a Linen module, or the
        function returned by `awq_jax.nnx.functional`. It must be traceable by `jax.jit`.
      params: parameter pytree, float leaves.
      batches: iterable of an array (one argument), a tuple (arguments) or a dict (keyword arguments).
        Batches of a different shape cost one more compilation, and so does another value of what is no array
        (``train=False``).
      plan: scale groups, e.g. edited by hand; discovered from the model if absent. Either is proven on some tokens
        of the first batch (`awq_jax.plan.verify.verify`): a group that moves the output loses its absorbers.
      verified: ``plan`` has been proven already.
      include_head: also keep statistics for the matmul that makes the model's output.
      check: called with the plan before any batch is run; what it raises stops the calibration.
      keep_out: keep batches out; False: fit to all.
      progress: show a progress bar on stderr; or call this function with what is done of how much (see
        `awq_jax.progress`).

    Raises:
      CalibrationError: no batches, every batch is empty, or ``batches`` is one array.
      PlanError: ``plan`` does not describe ``params``.
    """
    check_batches(batches)
    sums: dict[bool, dict[str, Stats]] = {}  # of batches that are kept out, and of others
    step: Callable[[dict[str, Stats], object, list[object], Form], dict[str, Stats]] | None = None
    tokens = 0
    for batch, aside in in_turn(through(batches, progress, "calibrate", "batch")):
        args, kwargs = arguments(batch)
        if step is None:
            plan = plan or discover(apply_fn, params, *args, **kwargs)
            validate(plan, params)
            if check is not None:
                check(plan)
            if not verified:
                few, named = few_tokens(apply_fn, params, args, kwargs)
                plan = verify(plan, apply_fn, params, *few, **named)
            wanted = [Wanted(group) for group in _without_head(plan, include_head)]
            step = _adder(collector(apply_fn, wanted), params)
            shapes = {w.group.name: w.shapes() for w in wanted}
        before = sums.pop(aside := aside and keep_out, None) or plain_zeros(shapes)
        # Waiting here bounds what is in flight to one batch.
        sums[aside] = jax.block_until_ready(step(before, params, *split(args, kwargs)))
        tokens += count_tokens(args, kwargs)
    if plan is None or tokens == 0:
        raise CalibrationError("the calibration set is empty: pass at least one batch of tokens")
    kept = {g.name: sums[True][g.name] for g in plan.groups if not g.batch and g.name in sums.get(True, ())}
    return Calibration(plan, sums[False], tokens, kept)


def _sum(a: Mapping[str, Stats], b: Mapping[str, Stats]) -> dict[str, Stats]:
    both = {k: jax.tree.map(lambda x, y: x + y, a[k], b[k]) for k in a if k in b}
    return {**a, **b, **both}


def _adder(
    collect: Callable[..., tuple[object, dict[str, Stats]]], params: object
) -> Callable[[dict[str, Stats], object, list[object], Form], dict[str, Stats]]:
    """``(sums, params, arrays, form)`` to sums with those of a batch, in the memory of the former.

    ``collect``: of `collector`.
    """

    def of_batch(params: object, arrays: list[object], form: Form) -> dict[str, Stats]:
        args, kwargs = form.join(arrays)
        return collect(params, args, kwargs)[1]

    def add(sums: dict[str, Stats], new: dict[str, Stats]) -> dict[str, Stats]:
        return jax.tree.map(jnp.add, sums, new)

    if all(len(x.devices()) == 1 for x in jax.tree.leaves(params) if isinstance(x, jax.Array)):
        return jax.jit(lambda sums, *batch: add(sums, of_batch(*batch)), static_argnums=3, donate_argnums=0)
    # Where the compiler puts sums on a mesh is known after the first batch.
    alone, plus = jax.jit(of_batch, static_argnums=2), jax.jit(add, donate_argnums=0)
    return lambda sums, p, arrays, form: plus(sums, alone(p, arrays, form))


def _without_head(plan: Plan, include_head: bool) -> tuple[ScaleGroup, ...]:
    return tuple(g for g in plan.groups if include_head or not all(s.head for s in g.sites))


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to sum up for a group.

    Attributes:
      group: whose statistics.
      experts: None for all; a number for the Grams of so many experts at a time; 0 for one Gram that is the
        sum over all experts, and everything else of each.
    """

    group: ScaleGroup
    experts: int | None = None

    def shapes(self) -> Stats:
        """Of the sums."""
        g, k = self.group, self.group.channels
        lead = (*g.scan, *g.batch) if not self.experts else (self.experts,)
        of_gram = g.scan if self.experts == 0 else lead
        shapes = ((*of_gram, k, k), (*lead, k), lead, lead)
        return Stats(*(cast(Any, jax.ShapeDtypeStruct(shape, jnp.float32)) for shape in shapes))


def plain_zeros(shapes: Mapping[str, Stats]) -> dict[str, Stats]:
    """Sums of nothing, by the name of the group, on the default device."""
    return {name: jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype)), s) for name, s in shapes.items()}


def collector(apply_fn: Callable[..., T], wanted: Iterable[Wanted]) -> Callable[..., tuple[T, dict[str, Stats]]]:
    """A jit-able ``(params, args, kwargs, start=0) -> (output, {group: Stats})``.

    ``start``: int32, the first of the experts where only some are wanted.
    """
    first = {(w.group.sites[0].path, w.group.sites[0].part): w for w in wanted}

    def run(params: object, args: Args, kwargs: Kwargs, start: jax.Array | int = 0) -> tuple[T, dict[str, Stats]]:
        program = interpret.trace(apply_fn, params, *args, **kwargs)
        missing = sorted(path for path, _ in set(first) - {(use.path, use.part) for use in program.uses})
        if missing:
            raise CalibrationError(f"the model has no matmul with {missing[0]}: the plan is for another model")

        def tap(use: interpret.Use, x: jax.Array, expert: jax.Array | None = None) -> Stats | None:
            if (use.path, use.part) not in first:
                return None
            wanted = first[use.path, use.part]
            experts = wanted.experts
            if expert is not None:
                sums = by_expert.sums(x, expert, math.prod(wanted.group.batch))
                return Stats(*sums)
            if experts:
                x = x.reshape(-1, *x.shape[-2:])
                x = jax.lax.dynamic_slice_in_dim(x, start, experts)
            return batch_sums(x, summed=experts == 0)

        output, tapped = interpret.run(program, params, *args, tap=tap, **kwargs)
        out: dict[str, Stats] = {}
        for use in program.uses:
            if (use.path, use.part) in first:
                mine = first[use.path, use.part]
                name = mine.group.name
                one = _fit(tapped[use.index], use, mine)
                out[name] = jax.tree.map(jnp.add, out[name], one) if name in out else one
        return output, out

    return run


def batch_sums(x: jax.Array, summed: bool = False) -> Stats:
    """Statistics of ``x [*batch, T, K]``; ``summed``: of the Gram only its sum over the batch.

    Tokens with a NaN or inf count as dropped. Rows of zeros are not tokens: they are the empty slots
    of an expert's buffer.
    """
    finite = jnp.isfinite(x).all(axis=-1, keepdims=True)
    x = jnp.where(finite, x, 0)
    # Products of 16-bit floats are exact in float32 as they are.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    tokens = x.reshape(-1, x.shape[-1]) if summed else x

    def product(x: jax.Array) -> jax.Array:
        return jnp.einsum("...tk,...tj->...kj", x, x, precision=precision, preferred_element_type=jnp.float32)

    gram = _in_slabs(product, tokens)
    count = (x != 0).any(axis=-1).sum(axis=-1, dtype=jnp.float32)
    dropped = (~finite[..., 0]).sum(axis=-1, dtype=jnp.float32)
    return Stats(gram, jnp.abs(x).astype(jnp.float32).sum(axis=-2), count, dropped)


def _in_slabs(product: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """``product(x)`` of ``x [*batch, T, K]``, which is a sum over T: ``SLAB`` rows after the other where K is small.

    XLA on CPU cuts a long contraction into as many sums as there are threads when its result is small (found
    for K up to 256), and adds the slabs of one array in an order that depends on them, too; a loop it leaves as it is.
    """
    t, k = x.shape[-2:]
    if k > SLAB_CHANNELS or t <= SLAB:
        return product(x)
    slabs = -(-t // SLAB)
    x = jnp.pad(x, [*((0, 0) for _ in x.shape[:-2]), (0, slabs * SLAB - t), (0, 0)])

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + product(jax.lax.dynamic_slice_in_dim(x, i * SLAB, SLAB, axis=-2))

    return jax.lax.fori_loop(0, slabs, add, jnp.zeros((*x.shape[:-2], k, k), jnp.float32))


def _fit(stats: Stats, use: interpret.Use, wanted: Wanted) -> Stats:
    """Sum over iterations of loops that share the weight, so that shapes match the group's."""
    shared = tuple(i for i, letter in enumerate(use.loops) if letter == "r")
    stats = jax.tree.map(lambda a: a.sum(axis=shared), stats)
    expected = wanted.shapes().count.shape
    if stats.count.shape != expected:
        raise CalibrationError(
            f"{wanted.group.name}: statistics of shape {stats.count.shape}, the plan says {expected}: "
            "it is for another model"
        )
    return stats
