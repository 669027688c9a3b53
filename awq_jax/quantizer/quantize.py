"""`quantize`: parameters and calibration in, the same tree with packed leaves out."""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax import paths, report
from awq_jax.algorithm.methods import METHODS
from awq_jax.calibration.calibration import Calibration, Fetch, calibrate
from awq_jax.calibration.grams import all_finite
from awq_jax.config import AwqConfig
from awq_jax.devices.pool import HERE, Pool
from awq_jax.errors import CalibrationError, ConfigError, WeightError
from awq_jax.plan import fold, folded
from awq_jax.plan.plan import Plan, ScaleGroup, Site
from awq_jax.plan.validate import validate
from awq_jax.progress import Progress, bar
from awq_jax.qtensor import QuantizedTensor, Weight
from awq_jax.quantizer import adapters, advice, kept_out, parts, scale_groups
from awq_jax.quantizer.column_pieces import settings
from awq_jax.quantizer.following import Aim, Follower
from awq_jax.quantizer.group_inputs import KeptInputs
from awq_jax.quantizer.scale_groups import GroupScale, find_scale, round_group
from awq_jax.quantizer.targets import Target, select, share
from awq_jax.trace.shards import placed_as

log = logging.getLogger(__name__)

T = TypeVar("T")
FEW = 0.8  # share of the bytes that are meant to be packed, below which a user is warned
CalibrationData = Calibration | Plan | Iterable[object]


@overload
def quantize(
    params: T, calib: CalibrationData, config: AwqConfig | None = ..., *, return_report: Literal[True], **options: Any
) -> tuple[T, report.Report]: ...
@overload
def quantize(
    params: T,
    calib: CalibrationData,
    config: AwqConfig | None = ...,
    *,
    return_report: Literal[False] = ...,
    **options: Any,
) -> T: ...
def quantize(
    params: T,
    calib: CalibrationData,
    config: AwqConfig | None = None,
    *,
    apply_fn: Callable[..., object] | None = None,
    progress: Progress = True,
    return_report: bool = False,
    **settings: object,
) -> T | tuple[T, report.Report]:
    """Quantize every matmul weight of ``params`` (AWQ, arXiv 2306.00978).

    Pure: ``params`` is not changed, and the same arguments give the same bits.

    Args:
      params: float parameter pytree (Linen variables, an NNX state, nested dicts ...).
      calib: a `Calibration`; or the batches `calibrate` takes, with ``apply_fn``; or, for
        ``method="rtn"`` only, a bare `Plan`.
      config: an `AwqConfig`; or pass its fields as keyword arguments.
      apply_fn: the model's function, needed when ``calib`` is raw batches.
      progress: show a progress bar on stderr; or call this function with what is done of how much (see
        `awq_jax.progress`).
      return_report: also return a `Report`.
      **settings: fields of `AwqConfig`.

    Returns:
      The same tree: quantized leaves are `QuantizedTensor` (cut over a mesh as the float ones were, as far as whole
      experts, columns and groups of rows go), absorbers and unquantized weights that
      read a scaled activation are rescaled, everything else is as it was. With ``return_report``, a
      pair of that and the `Report`.

    Raises:
      ConfigError: bad settings.
      CalibrationError: no statistics for these settings, or an empty calibration set.
      PlanError: the plan does not describe ``params``.
      WeightError: a weight that is packed or folded into holds NaN or inf, or one is packed already.
      ShapeError: the group size does not divide some weights; all are listed.
    """
    if config is not None and settings:
        raise ConfigError("pass either an AwqConfig or settings, not both")
    config = config or AwqConfig.from_dict(settings)
    started = time.perf_counter()
    parameters, factors = paths.flatten(params), adapters.factors(params)
    if isinstance(calib, Plan):
        if METHODS[config.method].needs_statistics:
            free = " or ".join(f'"{name}"' for name, method in METHODS.items() if not method.needs_statistics)
            raise CalibrationError(
                f'method="{config.method}" needs calibration statistics; a bare plan allows {free} only'
            )
        calib = Calibration(calib, {}, 0)
    elif not isinstance(calib, Calibration):
        if apply_fn is None:
            raise CalibrationError("raw batches need apply_fn=...; or pass the result of awq_jax.calibrate")
        check_float(parameters)
        calib = calibrate(
            apply_fn,
            params,
            calib,
            include_head=config.quantize_head,
            check=lambda plan: check_finite(changed(plan, select(plan, config, parameters, factors)[0], parameters)),
            progress=progress,
        )
    calibrated = time.perf_counter()
    plan = calib.plan
    validate(plan, params)
    check_float(parameters)
    targets, _ = select(plan, config, parameters, factors)
    check_finite(changed(plan, targets, parameters))

    work = with_targets(plan, targets)
    absent = [g.name for g, _ in work if g.name not in calib.stats]
    if absent and METHODS[config.method].needs_statistics:
        raise CalibrationError(
            f"no statistics for {', '.join(absent)}: calibrate with include_head=True if it makes the model's output, "
            "or with the plan in use"
        )
    checked = time.perf_counter()
    with bar(progress, "quantize", "group", 2 * len(work)) as shown:
        judge = kept_out.Judge(parameters, calib.stats.get, calib.kept_out.get)
        follower = judge if calib.kept_out and METHODS[config.method].needs_statistics else None
        done = quantize_groups(plan, work, parameters, calib.stats.get, config, shown.update, follower=follower)
    seconds = {"calibrate": calibrated - started, **done.seconds}
    seconds["search"] += checked - calibrated
    out, summary = conclude(params, plan, config, done, seconds, calib.tokens, progress)
    return (out, summary) if return_report else out


def conclude(
    params: T,
    plan: Plan,
    config: AwqConfig,
    done: Quantized,
    seconds: dict[str, float],
    tokens: int,
    progress: Progress,
) -> tuple[T, report.Report]:
    """``params`` with what became of them, and the report; what a user should know is told.

    Args:
      seconds: by phase.
      tokens: calibrated on.
    """
    targets, skipped = select(plan, config, paths.flatten(params), adapters.factors(params))
    out = paths.map_with_path(lambda path, leaf: _placed(done.leaves[path], leaf), params)
    packed = share(plan, config, targets, skipped) if plan.sizes else None
    if packed is not None:
        _tell(packed, progress)
    summary = report.Report(
        config.to_dict(), done.rows, skipped, tokens, seconds, paths.nbytes(params), paths.nbytes(out), share=packed
    )
    summary.scales = folded.channel_scales(plan, done.scales)
    advice.warn(summary)
    return out, summary


def _placed(new: Weight, leaf: Weight) -> Weight:
    """What became of ``leaf``, if packed where that lay."""
    return placed_as(new, leaf) if isinstance(new, QuantizedTensor) else new


def _tell(packed: report.Share, progress: Progress) -> None:
    """The share that is packed, where progress is shown; a warning where it is small."""
    if packed.of_meant < FEW:
        log.warning(
            "only %.0f%% of the bytes that matmuls read are packed; the largest that stay float: %s",
            100 * packed.of_all,
            packed.largest(meant=True),
        )
    elif progress is True:
        print(f"packed {packed}", file=sys.stderr)


Work = list[tuple[ScaleGroup, list[Target]]]


def with_targets(plan: Plan, targets: Mapping[str, Target]) -> Work:
    """The groups that have weights to be quantized, each with those weights."""
    return [(g, mine) for g in plan.groups if (mine := [targets[s.name] for s in g.sites if s.name in targets])]


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What became of some leaves.

    Attributes:
      leaves: by path: packed, rescaled, or as they were.
      rows: of the packed ones, in plan order.
      seconds: spent on ``"search"`` and ``"round"``.
      scales: group -> ``s [*scan, *batch, K]``, of the groups whose scale was folded.
    """

    leaves: dict[str, Weight]
    rows: list[report.LayerReport]
    seconds: dict[str, float]
    scales: dict[str, np.ndarray]


def quantize_groups(
    plan: Plan,
    work: Work,
    leaves: Mapping[str, Weight],
    fetch: Fetch,
    config: AwqConfig,
    progress: Callable[[], object] = lambda: None,
    pool: Pool = HERE,
    consume: bool = False,
    follower: Follower | None = None,
) -> Quantized:
    """Search the scales of some groups, and pack their weights.

    Args:
      plan: where these groups stand; nothing outside ``leaves`` is an absorber of theirs.
      work: from `with_targets`.
      leaves: float parameters by path.
      fetch: calibration sums by the name of the group.
      progress: called twice for each group.
      pool: devices that share the work; the result does not depend on their number.
      consume: what ``fetch`` returns is not needed afterwards: its memory may be used.
      follower: what says, group by group, what to round for; None: the weights themselves, by ``fetch``.
    """
    started = time.perf_counter()
    scales: dict[str, GroupScale] = {}
    packed: dict[str, QuantizedTensor] = {}
    rows: list[report.LayerReport] = []
    inputs = KeptInputs(pool.size == 1 and pool.team is None)
    with settings():
        # A scale of 1 where there is none: then the programs do not depend on what was found.
        ones = {g.name: np.ones((*g.scan, *g.batch, g.channels), np.float32) for g, _ in work}
        # Those that take the scale of another come after it.
        for group, mine in sorted(work, key=lambda entry: entry[0].follows is not None):
            if group.follows is not None:
                scales[group.name] = _scale_of_leader(group, scales)
                progress()
                continue
            stats = fetch(group.name)
            found_here = find_scale(group, mine, leaves, stats, config, pool, inputs)
            if follower is not None and found_here.scale is not None:
                alone = fold.Folder(plan, ones | {group.name: found_here.scale})
                given = group, mine, leaves, alone, found_here, stats, config, pool
                trial = functools.partial(round_group, *given, kept=inputs)
                if (why := follower.refuse(group, mine, stats, alone, trial)) is not None:
                    found_here = GroupScale(None, reason=why)
            scales[group.name] = found_here
            del stats
            progress()
        searched = time.perf_counter()
        found = {n: s.scale for n, s in scales.items() if s.scale is not None}
        folded = fold.Folder(plan, ones | found)
        # A weight that stays float is scaled only where something upstream absorbed the scale.
        kept = {g.name: found[g.name] for g, _ in work if g.name in found and g.absorbers}
        absorbed = fold.Folder(plan, kept)
        plain = dataclasses.replace(config, method="rtn")
        if follower is not None:
            follower.begin(absorbed, {t.site.path for _, mine in work for t in mine})
        for group, mine in work:
            found_here = scales[group.name]
            aim = follower.reach(group, mine, found_here) if follower else Aim(fetch(group.name), {})
            rounding = functools.partial(round_group, group, mine, leaves, folded, found_here)
            made = rounding(aim.stats, config, pool, consume, aim.weights, inputs)
            inputs.drop(group.name)
            if follower is not None:
                used_up = consume and group.channels >= scale_groups.IN_PLACE  # then it tells no errors
                again = functools.partial(rounding, None if used_up else aim.stats, plain, pool)
                made = follower.judge(made, folded, again)
            for name, (q, row) in made.items():
                packed[name] = q
                rows.append(row)
            if follower is not None:
                follower.put(group, packed, mine)
            progress()
    sites: dict[str, list[Site]] = {}
    for t in (t for _, mine in work for t in mine):
        sites.setdefault(t.site.path, []).append(t.site)
    out = {
        path: parts.join(sites[path], packed) if path in sites else absorbed.leaf(path, leaf)
        for path, leaf in leaves.items()
    }
    jax.block_until_ready(jax.tree.leaves(out))
    return Quantized(out, rows, {"search": searched - started, "round": time.perf_counter() - searched}, kept)


def _scale_of_leader(group: ScaleGroup, found: Mapping[str, GroupScale]) -> GroupScale:
    """The scale of a group that follows another, of those that were ``found``."""
    assert group.follows is not None
    name = group.follows.group
    if name not in found:
        return GroupScale(None, reason=f"it would take the scale of {name}, which is left float")
    leader = found[name]
    if leader.scale is None:
        return leader
    return GroupScale(np.asarray(fold.followed(group, leader.scale)), leader.ratio, leader.reason)


def changed(plan: Plan, targets: Mapping[str, Target], leaves: Mapping[str, Weight]) -> dict[str, Weight]:
    """The leaves that are packed or that scales fold into. Others, such as bounds of a clip, may be infinite."""
    groups = [g for g, _ in with_targets(plan, targets)]
    names = {s.path for g in groups for s in g.sites} | {a.path for g in groups for a in g.absorbers}
    return {path: leaf for path, leaf in leaves.items() if path in names}


def check_float(leaves: Mapping[str, object]) -> None:
    """Refuse what is packed already."""
    for path, leaf in leaves.items():
        if isinstance(leaf, QuantizedTensor):
            raise WeightError(f"{path} is quantized already: start from the float parameters")


def check_finite(leaves: Mapping[str, Any]) -> None:
    """Refuse NaN and inf before any time is spent on them, and what is packed already; ``leaves``: by path."""
    check_float(leaves)
    for path, leaf in leaves.items():
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and not all_finite(leaf):
            raise WeightError(f"{path} holds NaN or inf: repair or re-download the checkpoint")
