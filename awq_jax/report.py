"""`Report`: what a quantization run did, weight by weight, as plain data and as text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # reports are shown by commands that start without it
    import numpy as np


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
      shrinkage: mean share by which the input's correlations were shrunk where errors were weighed (the errors here
        are by all of them); None without statistics.
      kept_out_rtn, kept_out: as ``error_rtn`` and ``error`` on tokens that nothing was fitted to, against the results
        that the float model has; None if none were kept out.
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
    shrinkage: float | None = None
    kept_out_rtn: float | None = None
    kept_out: float | None = None
    scale: str = "none"
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Share:
    """How much of what matmuls read of the parameters is packed.

    Attributes:
      packed: bytes (as float) of the weights that are packed.
      left: (path, bytes, reason, whether a setting or a rule leaves it float: heads, routers, skip patterns, adapters)
        of each that stays float, largest first.
    """

    packed: int
    left: tuple[tuple[str, int, str, bool], ...] = ()

    @classmethod
    def of(cls, sizes: Mapping[str, int], left: Mapping[str, str], chosen: Collection[str] = ()) -> Share:
        """``sizes``: bytes of every weight; ``left``: those that stay float, with the reason."""
        rest = [(path, n, left[path], path in chosen) for path, n in sizes.items() if path in left]
        return cls(sum(sizes.values()) - sum(n for _, n, *_ in rest), tuple(sorted(rest, key=lambda x: -x[1])))

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.packed + sum(n for _, n, *_ in self.left)

    @property
    def of_all(self) -> float:
        """The share of all that is packed, 0 to 1."""
        return self.packed / max(self.total, 1)

    @property
    def of_meant(self) -> float:
        """The same without what a setting or a rule leaves float."""
        return self.packed / max(self.packed + sum(n for _, n, _, chosen in self.left if not chosen), 1)

    def largest(self, count: int = 3, meant: bool = False) -> str:
        """The largest float weights and why they are; ``meant``: without what is left float on purpose."""
        notes = [(path, why, n) for path, n, why, chosen in self.left if not (meant and chosen)]
        sizes: dict[tuple[str, str], int] = {}
        for path, why, n in notes:
            key = re.sub(r"\d+(?=[./_]|$)", "*", path), re.sub(r"\d+", "*", why)
            sizes[key] = sizes.get(key, 0) + n
        top = sorted(sizes.items(), key=lambda x: -x[1])[:count]
        return "; ".join(f"{path} ({n / max(self.total, 1):.1%}: {why})" for (path, why), n in top)

    def __str__(self) -> str:
        largest = self.largest()
        return f"{self.of_all:.1%} of {size(self.total)} that matmuls read{f'; float: {largest}' if largest else ''}"


class FoldedScale(NamedTuple):
    """What was folded into a linear's weight: it is ``diag(input) W diag(1 / output)`` of what it was.

    Attributes:
      input: float32 ``[*B, K]``, positive: its inputs are divided by this; None for 1.
      output: float32 ``[*B, N]``, positive: its outputs are, for a linear that reads them; None for 1.
    """

    input: np.ndarray | None
    output: np.ndarray | None


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
      share: how much of what matmuls read is packed; None where it was not counted.
      scales: what was folded into the weights, by path; not where it is stored beside a weight (``inv_scale``).
    """

    config: dict[str, Any]
    layers: list[LayerReport]
    skipped: dict[str, str]
    tokens: int
    seconds: dict[str, float]
    bytes_before: int
    bytes_after: int
    calibration: str = ""
    share: Share | None = None
    scales: dict[str, FoldedScale] = dataclasses.field(default_factory=dict, repr=False)

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
        """Plain JSON data, without the folded scales."""
        plain = dataclasses.asdict(dataclasses.replace(self, scales={})) | {"bits_per_weight": self.bits_per_weight}
        return {name: value for name, value in plain.items() if name != "scales"}

    def __str__(self) -> str:
        return table(self)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            told = f"{type(self).__name__!r} object has no attribute {name!r}"
            if name in ("apply", "generate", "params", "save", "tokenizer"):
                told += f": quantize changes the model itself; m = awq_jax.load(...); m.quantize(...); m.{name}"
            raise AttributeError(told)


def table(report: Report, worst: int = 5) -> str:
    """What a terminal shows at the end of a run; the figures of the whole run stand last.

    Args:
      report: what `awq_jax.quantize` or ``Model.quantize`` returned.
      worst: layers listed by remaining error.
    """
    lines: list[str] = []
    if rows := report.worst(worst):
        lines += ["largest remaining errors (squared output error / squared output)"]
        head = ("weight", "shape", "bits", "rounded", "stored", "ratio")
        lines += [
            "  " + line
            for line in columns(
                [head]
                + [
                    (r.path, shape_text(r.shape), str(r.bits), number(r.error_rtn), number(r.error), number(r.ratio))
                    for r in rows
                ]
            )
        ]
        lines.append("")
    for title, notes in notes_of(report):
        lines.append(title)
        lines += [f"  {path}{f' ({count})' if count > 1 else ''}: {why}" for path, why, count in notes]
        lines.append("")
    return "\n".join(lines + columns(summary(report)))


def summary(report: Report) -> list[tuple[str, str]]:
    """(name, value) of the figures of the whole run."""
    config = report.config
    bits = sorted({r.bits for r in report.layers}) or [config.get("bits", "no")]
    groups = sorted({r.group_size for r in report.layers}) if config.get("group_size", -1) != -1 else []
    grouped = f"groups of {' and '.join(map(str, groups))}" if groups else "whole columns"
    rows = [
        (
            "quantized",
            f"{len(report.layers)} weights to {' and '.join(map(str, bits))} bits, "
            f"{grouped}, "
            f"{'symmetric' if config.get('symmetric') else 'asymmetric'}, {config.get('method')}",
        ),
        ("bits per weight", f"{report.bits_per_weight:.2f}, scales and zero points included"),
        (
            "size",
            f"{size(report.bytes_before)} before, {size(report.bytes_after)} after "
            f"({report.bytes_before / max(report.bytes_after, 1):.2f}x smaller)",
        ),
    ]
    if report.share is not None:
        rows.append(("packed", str(report.share)))
    before, after = (geometric(getattr(r, name) for r in report.layers) for name in ("error_rtn", "error"))
    if before is not None and after is not None:
        rows.append(("typical error", f"{number(before)} rounded to nearest, {number(after)} as stored"))
    before, after = (geometric(getattr(r, name) for r in report.layers) for name in ("kept_out_rtn", "kept_out"))
    if before is not None and after is not None:
        told = f"{number(before)} rounded to nearest, {number(after)} as stored, by tokens that nothing was fitted to"
        rows.append(("kept out", told))
    rows.append(("calibrated on", report.calibration or f"{report.tokens:,} tokens"))
    total = sum(report.seconds.values())
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.seconds.items())
    rows.append(("seconds", f"{total:.1f}" + (f" ({phases})" if len(report.seconds) > 1 else "")))
    return rows


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column padded to its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"


def number(value: float | None) -> str:
    """Three significant digits; "-" for None."""
    return "-" if value is None else f"{value:.3g}"


def notes_of(report: Report) -> list[tuple[str, list[tuple[str, str, int]]]]:
    """Headings with (path, reason, how many like it): what did not go the usual way."""
    found = [
        ("left float", alike(report.skipped.items())),
        ("scale kept beside the weight", alike((r.path, r.reason) for r in report.layers if r.scale == "explicit")),
        (
            "not scaled",
            alike((r.path, r.reason) for r in report.layers if r.scale == "none" and r.reason),
        ),
        ("other remarks", alike((r.path, r.reason) for r in report.layers if r.scale == "folded" and r.reason)),
    ]
    return [(title, notes) for title, notes in found if notes]


def alike(items: Iterable[tuple[str, str]]) -> list[tuple[str, str, int]]:
    """Paths that differ only in layer numbers, with the same reason, as one line with a count."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for path, why in items:
        pattern = re.sub(r"\d+(?=[./_]|$)", "*", path)
        found.setdefault((pattern, re.sub(r"\d+", "*", why)), []).append((path, why))
    return [
        (
            pattern if len(same) > 1 else same[0][0],
            same[0][1] if len({why for _, why in same}) == 1 else why,
            len(same),
        )
        for (pattern, why), same in found.items()
    ]


def shape_text(shape: Sequence[int]) -> str:
    """``(64, 128)`` as ``64 x 128``."""
    return " x ".join(map(str, shape))


def geometric(values: Iterable[float | None]) -> float | None:
    """The geometric mean of those that are known; None if there are none, or one is not positive."""
    known = [v for v in values if v is not None]
    if not known or not all(v > 0 and math.isfinite(v) for v in known):
        return None
    return math.exp(sum(math.log(v) for v in known) / len(known))
