"""Groups judged on tokens that nothing was fitted to."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import numpy as np

from awq_jax.algorithm.correction import Moments
from awq_jax.calibration.calibration import Fetch, Stats
from awq_jax.pack import Array
from awq_jax.plan.fold import Folder
from awq_jax.plan.plan import ScaleGroup
from awq_jax.qtensor import QuantizedTensor, Weight
from awq_jax.quantizer.following import Aim, Made
from awq_jax.quantizer.group_weights import GroupWeights
from awq_jax.quantizer.scale_groups import GroupScale
from awq_jax.quantizer.targets import Target
from awq_jax.report import LayerReport

Sums = tuple[Moments, Array]  # over the tokens kept out, and the gap: see `awq_jax.algorithm.correction.remaining`


def better(
    made: Made,
    weights: GroupWeights,
    sums: Sequence[Sums],
    tokens: float,
    folded: Folder,
    nearest: Callable[[], Made],
) -> Made:
    """What to keep of a group that has been rounded: that, or its nearest rounding if it is better; with its errors.

    Args:
      made: as rounded.
      weights: the group's.
      sums: of each scanned layer.
      tokens: kept out, for the reason that is told.
      folded: applies the scales of all groups.
      nearest: rounds the group to nearest.
    """

    def stored(made: Made) -> dict[str, tuple[float, float]]:
        return weights.remaining(sums, weights.unfolded({n: q for n, (q, _) in made.items()}, folded))

    plain, found = weights.remaining(sums, weights.nearest()), stored(made)
    if _sum(found) > _sum(plain):
        other = nearest()
        rounded = stored(other)
        if _sum(rounded) < _sum(found):
            why = f"worse than plain rounding on {tokens:.0f} tokens kept out: rounded so"
            made, found = {n: (q, _noted(row, why)) for n, (q, row) in other.items()}, rounded

    def told(name: str, row: LayerReport) -> LayerReport:
        return dataclasses.replace(row, kept_out=_share(*found[name]), kept_out_rtn=_share(*plain[name]))

    return {n: (q, told(n, row)) for n, (q, row) in made.items()}


def refused(
    group: ScaleGroup,
    targets: Sequence[Target],
    leaves: Mapping[str, Weight],
    stats: Stats | None,
    kept: Stats | None,
    alone: Folder,
    trial: Callable[[], Made],
) -> str | None:
    """See `awq_jax.quantizer.following.Follower.refuse`: with fewer tokens than channels, the group is rounded to see.

    A group that is rounded to nearest in the end has its scale all the same: others have absorbed it. One that
    protects the channels of a few tokens costs the others more than that gains.

    Args:
      leaves: float parameters by path.
      kept: sums of the tokens kept out.
    """
    if stats is None or kept is None or not judged(group, kept) or np.asarray(stats.count).min() >= group.channels:
        return None
    weights = GroupWeights(group, targets, leaves, {}, "")
    sums = list(_sums(kept, weights))
    stored = weights.unfolded({n: q for n, (q, _) in trial().items()}, alone)
    if _sum(weights.remaining(sums, stored)) <= _sum(weights.remaining(sums, weights.nearest())):
        return None
    return f"worse than plain rounding on {_tokens(kept):.0f} tokens kept out: no scale"


def judged(group: ScaleGroup, kept: Stats) -> bool:
    """Whether there are tokens to judge by: not of experts with an input of their own."""
    return not group.batch and bool(np.asarray(kept.count).all())


def _tokens(kept: Stats) -> float:
    return float(np.asarray(kept.count).max())


class Judge:
    """`awq_jax.quantizer.following.Follower` of a float model: groups are rounded for its inputs, and judged by others.

    Args:
      leaves: float parameters by path.
      fitted: sums of what groups are rounded for, by the name of the group.
      kept: sums of the tokens kept out, likewise.
    """

    def __init__(self, leaves: Mapping[str, Weight], fitted: Fetch, kept: Fetch) -> None:
        self._leaves, self._fitted, self._kept = leaves, fitted, kept
        self._targets: list[Target] = []
        self._group: ScaleGroup

    def refuse(
        self, group: ScaleGroup, targets: list[Target], stats: Stats | None, alone: Folder, trial: Callable[[], Made]
    ) -> str | None:
        return refused(group, targets, self._leaves, stats, self._kept(group.name), alone, trial)

    def begin(self, absorbed: Folder, targets: Collection[str]) -> None:
        pass

    def reach(self, group: ScaleGroup, targets: list[Target], found: GroupScale) -> Aim:
        self._group, self._targets = group, targets
        return Aim(self._fitted(group.name), {})

    def judge(self, made: Made, folded: Folder, nearest: Callable[[], Made]) -> Made:
        kept = self._kept(self._group.name)
        if kept is None or not judged(self._group, kept):
            return made
        weights = GroupWeights(self._group, self._targets, self._leaves, {}, "")
        return better(made, weights, list(_sums(kept, weights)), _tokens(kept), folded, nearest)

    def put(self, group: ScaleGroup, packed: Mapping[str, QuantizedTensor], targets: list[Target]) -> None:
        pass


def _sums(kept: Stats, weights: GroupWeights) -> list[Sums]:
    """Of each layer, with the input that the float model has."""
    k = kept.gram.shape[-1]
    none, nothing = np.zeros((k, k), np.float32), np.zeros((k, 0), np.float32)
    gap = np.zeros(weights.picked.shape[1], np.float32)
    grams = np.asarray(kept.gram).reshape(-1, k, k)
    return [(Moments(*map(jax.device_put, (gram, none, nothing))), gap) for gram in grams]


def _share(lost: float, own: float) -> float | None:
    return lost / own if own > 0 else None


def _sum(errors: Mapping[str, tuple[float, float]]) -> float:
    return sum(lost for lost, _ in errors.values())


def _noted(row: LayerReport, why: str) -> LayerReport:
    return dataclasses.replace(row, reason="; ".join(filter(None, (row.reason, why))))
