"""One picture of a run as inline SVG: the error of every weight, rounded to nearest and as stored."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from awq_jax.report import LayerReport

WIDTH, HEIGHT = 960, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 40


def errors(layers: Sequence[LayerReport]) -> str:
    """SVG with one column per weight in plan order, relative squared output error on a log axis.

    Args:
      layers: those without errors are left out.

    Returns:
      An ``<svg>`` element, or "" if no layer has both errors. Colours are the classes ``rtn``,
      ``stored``, ``stem`` and ``grid`` of the page around it.
    """
    known = [(i, r.path, r.error_rtn, r.error) for i, r in enumerate(layers) if r.error is not None]
    points = [(i, path, before, after) for i, path, before, after in known if before is not None]
    values = [v for point in points for v in point[2:] if v > 0 and math.isfinite(v)]
    if not values:
        return ""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def x(i: int) -> float:
        return LEFT + (i + 0.5) * (WIDTH - LEFT - RIGHT) / len(layers)

    def y(value: float) -> float:
        level = math.log10(value) if value > 0 and math.isfinite(value) else (low if value <= 0 else high)
        return TOP + (high - min(max(level, low), high)) * (HEIGHT - TOP - BOTTOM) / (high - low)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="relative output error of each weight, '
        'rounded to nearest and as stored">'
    ]
    for power in range(low, high + 1):
        at = y(10.0**power)
        label = f'10<tspan dy="-5" font-size="9">{power}</tspan>'
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    parts += [
        f'<text x="{x(i):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{i + 1}</text>' for i in _ticks(len(layers))
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">weight, as numbered below</text>')
    radius = 3.5 if len(points) <= 250 else 2.0
    for i, path, rounded, stored in points:
        at, before, after = x(i), y(rounded), y(stored)
        parts.append(
            f"<g><title>{i + 1}  {html.escape(path)}\nrounded {rounded:.3g}, stored {stored:.3g}</title>"
            f'<line class="stem" x1="{at:.1f}" x2="{at:.1f}" y1="{before:.1f}" y2="{after:.1f}"/>'
            f'<circle class="rtn" cx="{at:.1f}" cy="{before:.1f}" r="{radius}"/>'
            f'<circle class="stored" cx="{at:.1f}" cy="{after:.1f}" r="{radius}"/></g>'
        )
    return "".join([*parts, "</svg>"])


def _ticks(count: int) -> list[int]:
    """About ten evenly spaced columns, the first one included."""
    step = next(s * 10**e for e in range(9) for s in (1, 2, 5) if count <= 12 * s * 10**e)
    return [0, *range(step - 1 if step > 1 else 1, count, step)]
