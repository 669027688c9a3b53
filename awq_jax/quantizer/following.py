"""What rounding asks of a model that is quantized group by group, each for the input that those before it leave."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, Protocol

from awq_jax.calibration.calibration import Stats
from awq_jax.plan.fold import Folder
from awq_jax.plan.plan import ScaleGroup
from awq_jax.qtensor import QuantizedTensor, Weight
from awq_jax.quantizer.scale_groups import GroupScale
from awq_jax.quantizer.targets import Target
from awq_jax.report import LayerReport


class Aim(NamedTuple):
    """What a group is rounded for.

    Attributes:
      stats: of its input.
      weights: float32, by path, to be rounded in place of the model's own.
    """

    stats: Stats | None
    weights: Mapping[str, Weight]


Made = dict[str, tuple[QuantizedTensor, LayerReport]]  # of a group, by the name of the weight


class Follower(Protocol):
    """The quantized model as far as it is there; asked in the order of the forward pass."""

    def refuse(
        self, group: ScaleGroup, targets: list[Target], stats: Stats | None, alone: Folder, trial: Callable[[], Made]
    ) -> str | None:
        """Why ``group`` had better have no scale; None if nothing speaks against the one that was found.

        Asked before `begin`, not of groups without a scale.

        Args:
          stats: that it was found by.
          alone: folds it, and no other.
          trial: rounds the group with it.
        """

    def begin(self, absorbed: Folder, targets: Collection[str]) -> None:
        """All scales are known; ``absorbed`` folds those that something absorbs; ``targets``: paths to be packed."""

    def reach(self, group: ScaleGroup, targets: list[Target], found: GroupScale) -> Aim:
        """What ``group`` is to be rounded for."""

    def judge(self, made: Made, folded: Folder, nearest: Callable[[], Made]) -> Made:
        """What to keep: ``made``, or the ``nearest`` rounding, with what is known of errors; ``folded``: all scales."""

    def put(self, group: ScaleGroup, packed: Mapping[str, QuantizedTensor], targets: list[Target]) -> None:
        """Its weights are packed."""
