"""`Report`: what a quantization run did, weight by weight, as plain data."""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One quantized weight; a layer of the decoder has several.

    Attributes:
      path: parameter path.
      group: name of its scale group.
      shape: shape of the float leaf.
      bits, group_size, symmetric: how it is stored.
      bytes_before, bytes_after: size as float and packed.
      error_rtn: squared output error of plain rounding over the squared output, both expected
        over the calibration tokens; None without statistics.
      error: the same of what was stored. In both, a column that absorbs another group's scale counts
        with the weight that scale gives it.
      ratio: the exponent chosen in the scale search; None where the scale is 1.
      clipped: share of (group, column) pairs whose range was shrunk.
      scale: ``"folded"``, ``"explicit"`` (kept beside the weight) or ``"none"``.
      reason: why the scale is 1 or the method fell back, for the user to read; "" otherwise.
    """

    path: str
    group: str
    shape: tuple[int, ...]
    bits: int
    group_size: int
    symmetric: bool
    bytes_before: int
    bytes_after: int
    error_rtn: float | None = None
    error: float | None = None
    ratio: float | None = None
    clipped: float = 0.0
    scale: str = "none"
    reason: str = ""


@dataclasses.dataclass
class Report:
    """A whole run.

    Attributes:
      config: `AwqConfig.to_dict()`.
      layers: one entry per quantized weight, in plan order.
      skipped: path -> reason, for matmul weights left float.
      tokens: calibration tokens used.
      seconds: phase -> wall seconds (``"calibrate"``, ``"search"``, ...).
      bytes_before, bytes_after: all parameters, float and as returned.
      calibration: `awq_jax.data.CalibrationSet.description`: source, column, sizes; "" where it is not known.
    """

    config: dict[str, Any]
    layers: list[LayerReport]
    skipped: dict[str, str]
    tokens: int
    seconds: dict[str, float]
    bytes_before: int
    bytes_after: int
    calibration: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits (codes, scales, zeros) per quantized weight."""
        weights = sum(math.prod(r.shape) for r in self.layers)
        return 8.0 * sum(r.bytes_after for r in self.layers) / max(weights, 1)

    def worst(self, count: int = 5) -> list[LayerReport]:
        """The weights with the largest remaining relative error."""
        known = [r for r in self.layers if r.error is not None]
        return sorted(known, key=lambda r: -(r.error or 0.0))[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dataclasses.asdict(self) | {"bits_per_weight": self.bits_per_weight}
