"""`allocate`: bits for every weight of a model, where their mean is given."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from awq_jax import paths
from awq_jax.budget import losses, sensitivity
from awq_jax.budget.choose import Choices, choose
from awq_jax.calibration.calibration import Calibration, calibrate
from awq_jax.config import AwqConfig, Budget, LeafConfig
from awq_jax.errors import ConfigError
from awq_jax.plan.plan import Plan
from awq_jax.progress import Progress
from awq_jax.quantizer import adapters
from awq_jax.quantizer.targets import Target, select
from awq_jax.trace.probes import Place

SCALE_BITS, ZERO_BITS = 16, 8  # as a `QuantizedTensor` has them


class Setting(NamedTuple):
    """What an override says: bits and group size, -1 for the whole column."""

    bits: int
    group_size: int


@dataclasses.dataclass(frozen=True)
class Unit:
    """Weights that are stored alike: those that share an input, as engines multiply them as one, or a layer's experts.

    Attributes:
      paths: of the weights.
      leaf: what was chosen for them.
      numbers: how many weights they have.
      bits: of storage, for each of those, with scales and zero points.
      loss: what rounding them so is predicted to add to the divergence from the float model, in nats per prediction.
    """

    paths: tuple[str, ...]
    leaf: LeafConfig
    numbers: int
    bits: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What `allocate` chose.

    Attributes:
      config: with an override for each choice: pass it to `awq_jax.quantize`.
      units: in the order of the model.
      target_bits: what was asked for.
    """

    config: AwqConfig
    units: tuple[Unit, ...]
    target_bits: float

    @property
    def bits(self) -> float:
        """Of storage for each packed weight, with scales and zero points."""
        return sum(u.bits * u.numbers for u in self.units) / sum(u.numbers for u in self.units)

    @property
    def loss(self) -> float:
        """The predicted divergence from the float model, nats per prediction, if errors do not add up or cancel."""
        return sum(u.loss for u in self.units)

    def __str__(self) -> str:
        shares: dict[tuple[int, int], int] = {}
        for u in self.units:
            key = u.leaf.bits, u.leaf.group_size
            shares[key] = shares.get(key, 0) + u.numbers
        whole = sum(shares.values())
        each = ", ".join(f"{n / whole:.0%} in {b} bits (groups of {g})" for (b, g), n in sorted(shares.items()))
        return f"{self.bits:.3f} bits per packed weight for {self.target_bits:g}: {each}"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an allocation rests on.

    Attributes:
      errors: by the name of a site, float64 ``[candidates]``: `awq_jax.budget.losses.squared_errors`.
      squares: by place, squared gradients summed over all predictions.
      predictions: how many.
    """

    errors: Mapping[str, np.ndarray]
    squares: Mapping[Place, float]
    predictions: int

    def losses(self, target: Target) -> np.ndarray:
        """What each candidate of a weight costs, nats per prediction; see `awq_jax.budget.losses`."""
        squares = self.squares.get(Place(target.site.path, tuple(target.site.part)), 0.0)
        return 0.5 * squares / self.predictions * self.errors[target.site.name]


def allocate(
    apply_fn: Callable[..., object],
    params: object,
    batches: Iterable[object],
    config: AwqConfig | None = None,
    *,
    target_bits: float | Budget,
    calib: Calibration | None = None,
    progress: Progress = True,
    **settings: object,
) -> Allocation:
    """Choose bits and group sizes for every weight, so that all together take ``target_bits`` per weight.

    ::

        few = batches[:4]
        mixed = awq_jax.allocate(model.apply, params, few, target_bits=3.5)
        qparams = awq_jax.quantize(params, calib, mixed.config)

    Weights that share an input get the same setting, as do the experts of a layer. What a setting costs is predicted
    (`awq_jax.budget.losses`) from how its errors are weighed by the calibration, and from the gradients of the model's
    own log likelihood; nothing is rounded for it. Settings are then chosen that lose the least together. The model
    returns logits: ``[..., classes]``.

    Memory: that of one step of training without an optimizer, and of `awq_jax.calibrate`.

    Args:
      apply_fn, params: as for `awq_jax.calibrate`.
      batches: a few: 1,024 tokens in all were enough to tell the weights of stories15M apart.
      config: settings; overrides in it hold, and count. Or pass its fields.
      target_bits: mean bits per packed weight, as `Report.bits_per_weight` counts them; or a `Budget`, which also says
        what to choose from.
      calib: of this model; made from ``batches`` if absent.
      progress: show progress bars on stderr; or call this function with what is done of how much.
      **settings: fields of `AwqConfig`.

    Raises:
      ConfigError: bad settings, a budget that no choice is within, or a model whose logits are not known.
      CalibrationError, ShapeError: as `awq_jax.quantize`.
    """
    if config is not None and settings:
        raise ConfigError("pass either an AwqConfig or settings, not both")
    config = config or AwqConfig.from_dict(settings)
    budget = Budget.of(target_bits)
    config = budget.base(config)
    batches = list(batches)
    if calib is None:
        calib = calibrate(
            apply_fn, params, batches, include_head=config.quantize_head, keep_out=False, progress=progress
        )
    leaves = paths.flatten(params)
    targets, _ = select(calib.plan, config, leaves, adapters.factors(params))
    tried = candidates(targets.values(), config, budget)
    errors: dict[str, np.ndarray] = {}
    for group in calib.plan.groups:
        if mine := [targets[s.name] for s in group.sites if s.name in targets]:
            errors |= losses.squared_errors(mine, leaves, calib.stats[group.name], config, tried)
    places = sensitivity.places_of(calib.plan, {t.site.path for t in targets.values()})
    squares, predictions = sensitivity.of_model(apply_fn, params, batches, places)
    return best(calib.plan, targets, config, budget, tried, Measured(errors, squares, predictions))


Tried = Mapping[str, Mapping[Setting, LeafConfig]]


def candidates(targets: Iterable[Target], config: AwqConfig, budget: Budget) -> dict[str, dict[Setting, LeafConfig]]:
    """What each weight may be, by the name of its site, and as what it is then stored: one thing where an override
    names it.

    Args:
      targets: selected by `Budget.base` of ``config``, whose group size is among the choices of all of them.
    """
    out: dict[str, dict[Setting, LeafConfig]] = {}
    for t in targets:
        if _is_fixed(t, config):
            out[t.site.name] = {Setting(t.leaf.bits, t.leaf.group_size): t.leaf}
            continue
        sizes = dict.fromkeys(
            g for g in (*budget.group_sizes, config.group_size) if g in (-1, config.group_size) or t.k % g == 0
        )
        out[t.site.name] = {
            Setting(bits, g): dataclasses.replace(t.leaf, bits=bits, group_size=t.k if g == -1 else g)
            for bits in budget.widths
            for g in sizes
        }
    return out


def _is_fixed(t: Target, config: AwqConfig) -> bool:
    return any(re.search(pattern, t.site.path) for pattern, _ in config.overrides)


def storage(target: Target, leaf: LeafConfig) -> float:
    """Bits that a weight takes if it is stored so, with scales, zero points and rows that fill up its last group."""
    rows = -(-target.k // leaf.group_size) * leaf.group_size / target.k
    each = leaf.bits + (SCALE_BITS + (0 if leaf.symmetric else ZERO_BITS)) / leaf.group_size
    return math.prod(target.site.part_shape) * rows * each


def best(
    plan: Plan,
    targets: Mapping[str, Target],
    config: AwqConfig,
    budget: Budget,
    tried: Tried,
    measured: Measured,
) -> Allocation:
    """The settings that lose the least within the budget.

    Args:
      plan: of the model.
      targets: by the name of the site.
      config: settings of the quantization.
      budget: of all ``targets``.
      tried: `candidates`.
      measured: of all targets.

    Raises:
      ConfigError: the budget is below what the smallest settings take, or above the largest.
    """
    units = [_Undecided(mine, tried, measured) for mine in alike(plan, targets, config)]
    numbers = sum(u.numbers for u in units)
    low, high = (sum(pick(u.choices.bits) for u in units) / numbers for pick in (min, max))
    wanted = budget.target_bits
    if not low - 1e-9 <= wanted <= high + 1e-9:
        raise ConfigError(
            f"target_bits={wanted:g} is out of reach: with these widths and group sizes weights take "
            f"{low:.3f} to {high:.3f} bits, scales and zero points included"
        )
    picked = choose([u.choices for u in units], wanted * numbers * (1 + 1e-12))
    chosen: dict[Setting, list[str]] = {}
    for u, c in zip(units, picked, strict=True):
        if not _is_fixed(u.targets[0], config):
            chosen.setdefault(u.settings[c], []).extend(u.paths)
    made = [(f"^(?:{'|'.join(map(re.escape, every))})$", s._asdict()) for s, every in chosen.items()]
    done = tuple(u.as_chosen(c) for u, c in zip(units, picked, strict=True))
    return Allocation(dataclasses.replace(config, overrides=(*config.overrides, *made)), done, wanted)


def alike(plan: Plan, targets: Mapping[str, Target], config: AwqConfig) -> list[list[Target]]:
    """Targets that are stored alike, in the order of the plan.

    Those of one scale group; parts of one leaf; and experts: the weights between which one expert's rows go. What an
    override of ``config`` names is stored as that says, whatever the others are.
    """
    parent: dict[str, str] = {}  # by path

    def root(path: str) -> str:
        while parent.setdefault(path, path) != path:
            path = parent[path]
        return path

    experts: set[str] = set()
    for g in plan.groups:
        free = [t.site.path for s in g.sites if (t := targets.get(s.name)) and not _is_fixed(t, config)]
        experts |= set(free) if g.batch else set()
        before = [a.path for a in g.absorbers if a.path in experts] if g.batch and free else []
        for path in (*free, *before):
            parent[root(path)] = root(free[0])
    out: dict[str, list[Target]] = {}
    for _, site in plan.sites():
        if site.name in targets:
            out.setdefault(root(site.path), []).append(targets[site.name])
    return list(out.values())


class _Undecided:
    """What a unit may be: the settings that all of its weights may have."""

    def __init__(self, targets: Sequence[Target], tried: Tried, measured: Measured) -> None:
        self.targets, self._tried = targets, [tried[t.site.name] for t in targets]
        self.settings = [s for s in self._tried[0] if all(s in other for other in self._tried)]
        self.paths = tuple(dict.fromkeys(t.site.path for t in targets))
        self.numbers = sum(math.prod(t.site.part_shape) for t in targets)
        pairs = list(zip(targets, self._tried, strict=True))
        bits = [sum(storage(t, own[s]) for t, own in pairs) for s in self.settings]
        lost = [sum(float(measured.losses(t)[list(own).index(s)]) for t, own in pairs) for s in self.settings]
        # Of what no token was seen nothing is known: it may be as small as it gets.
        self.choices = Choices(np.asarray(bits), np.nan_to_num(lost, nan=0.0))

    def as_chosen(self, choice: int) -> Unit:
        """The unit, decided."""
        leaf = self._tried[0][self.settings[choice]]
        bits, loss = float(self.choices.bits[choice]), float(self.choices.losses[choice])
        return Unit(self.paths, leaf, self.numbers, bits / self.numbers, loss)
