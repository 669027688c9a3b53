"""A quantization `Report` for people: a terminal summary, and one self-contained HTML page."""

from __future__ import annotations

import html as _html
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from awq_jax.cli import chart
from awq_jax.report import LayerReport, Report


def table(report: Report, worst: int = 5) -> str:
    """The summary a terminal shows at the end of a run.

    Args:
      report: what `awq_jax.quantize` or ``Model.quantize`` returned.
      worst: layers listed by remaining error.
    """
    lines = columns(summary(report))
    if rows := report.worst(worst):
        lines += ["", "largest remaining errors (squared output error / squared output)"]
        head = ("weight", "shape", "bits", "rounded", "stored", "ratio")
        lines += [
            "  " + line
            for line in columns(
                [head]
                + [
                    (r.path, _shape(r.shape), str(r.bits), number(r.error_rtn), number(r.error), number(r.ratio))
                    for r in rows
                ]
            )
        ]
    for title, notes in _notes(report):
        lines += ["", title]
        lines += [f"  {path}{f' ({count})' if count > 1 else ''}: {why}" for path, why, count in notes]
    return "\n".join(lines)


def summary(report: Report) -> list[tuple[str, str]]:
    """(name, value) of the figures of the whole run."""
    config = report.config
    group = config.get("group_size", -1)
    rows = [
        (
            "quantized",
            f"{len(report.layers)} weights to {config.get('bits')} bits, "
            f"{'whole columns' if group == -1 else f'groups of {group}'}, "
            f"{'symmetric' if config.get('symmetric') else 'asymmetric'}, {config.get('method')}",
        ),
        ("bits per weight", f"{report.bits_per_weight:.2f}, scales and zero points included"),
        (
            "size",
            f"{size(report.bytes_before)} before, {size(report.bytes_after)} after "
            f"({report.bytes_before / max(report.bytes_after, 1):.2f}x smaller)",
        ),
    ]
    before, after = (_geometric(getattr(r, name) for r in report.layers) for name in ("error_rtn", "error"))
    if before is not None and after is not None:
        rows.append(("typical error", f"{number(before)} rounded to nearest, {number(after)} as stored"))
    rows.append(("calibrated on", report.calibration or f"{report.tokens:,} tokens"))
    total = sum(report.seconds.values())
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.seconds.items())
    rows.append(("seconds", f"{total:.1f}" + (f" ({phases})" if len(report.seconds) > 1 else "")))
    return rows


def html(report: Report, title: str = "awq_jax report") -> str:
    """One HTML page without external resources: figures, a picture, every weight, every exception.

    Args:
      report: as for `table`.
      title: heading of the page; escaped like all text.
    """
    body = [f"<h1>{_html.escape(title)}</h1>", "<dl>"]
    body += [f"<div><dt>{_html.escape(k)}</dt><dd>{_html.escape(v)}</dd></div>" for k, v in summary(report)]
    body.append("</dl>")
    drawing = chart.errors(report.layers)
    if drawing:
        body += [
            "<h2>Error of each weight</h2>",
            "<p>Squared error of the weight's output over its squared output, both expected over the calibration "
            'tokens.</p><p><span class="key"><i class="rtn"></i>rounded to nearest</span> '
            '<span class="key"><i class="stored"></i>as stored</span></p>',
            f'<figure class="wide">{drawing}</figure>',
        ]
    else:
        body.append("<p>No picture: this run kept no calibration statistics to measure errors with.</p>")
    for heading, notes in _notes(report):
        body.append(f"<h2>{_html.escape(heading)}</h2><ul>")
        body += [
            f"<li><code>{_html.escape(path)}</code>{f' ({count})' if count > 1 else ''}: {_html.escape(why)}</li>"
            for path, why, count in notes
        ]
        body.append("</ul>")
    body += ["<h2>Every weight</h2>", _weights(report.layers)]
    body += ["<h2>Settings</h2>", _settings(report.config)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_html.escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


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


def _notes(report: Report) -> list[tuple[str, list[tuple[str, str, int]]]]:
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


def _weights(layers: Sequence[LayerReport]) -> str:
    head = ("", "weight", "shape", "bits", "group", "size", "rounded", "stored", "left", "ratio", "clipped", "scale")
    rows = []
    for i, r in enumerate(layers, 1):
        left = r.error / r.error_rtn if r.error is not None and r.error_rtn else None
        worse = ' class="worse"' if left is not None and left > 1 else ""
        cells = (
            str(i),
            r.path,
            _shape(r.shape),
            f"{r.bits}{' sym' if r.symmetric else ''}",
            str(r.group_size),
            size(r.bytes_after),
            number(r.error_rtn),
            number(r.error),
            "-" if left is None else f"{left:.0%}",
            number(r.ratio),
            f"{r.clipped:.1%}",
            r.scale,
        )
        note = f' title="{_html.escape(r.reason)}"' if r.reason else ""
        rows.append(f"<tr{worse}{note}>" + "".join(f"<td>{_html.escape(c)}</td>" for c in cells) + "</tr>")
    header = "".join(f"<th>{_html.escape(h)}</th>" for h in head)
    return (
        f'<div class="wide"><table><thead><tr>{header}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        "<p>rounded, stored: relative error rounded to nearest and as stored; left: the second over the first; "
        "ratio: exponent of the activation in the chosen scale; clipped: share of (group, column) pairs whose range "
        "was shrunk; scale: folded into other parameters, explicit beside the weight, or none.</p>"
    )


def _settings(config: Mapping[str, object]) -> str:
    rows = "".join(
        f"<tr><td>{_html.escape(str(k))}</td><td>{_html.escape(str(v))}</td></tr>" for k, v in config.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _geometric(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    if not known or not all(v > 0 and math.isfinite(v) for v in known):
        return None
    return math.exp(sum(math.log(v) for v in known) / len(known))


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #647084; --line: #dde3ec; --page: #fff; --tile: #f5f7fa;
  --rtn: #d9822b; --stored: #2563a8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #98a4b5; --line: #323b48; --page: #151a21;
  --tile: #1d242e; --rtn: #e8a35c; --stored: #6aa6ea; } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1080px;
  margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.5rem; margin: 0 0 1rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
h2::first-letter { text-transform: uppercase }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: .7rem; margin: 0 }
dl div { background: var(--tile); border-radius: 8px; padding: .6rem .9rem }
dt { color: var(--soft); font-size: .85rem } dt::first-letter { text-transform: uppercase } dd { margin: 0 }
p { color: var(--soft) } .wide { overflow-x: auto; margin: 0 }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600 } td:nth-child(2), th:nth-child(2) { text-align: left }
td:first-child { color: var(--soft) } tr.worse td { color: var(--rtn) }
code { font-size: .9em } li { overflow-wrap: anywhere }
svg { width: 100%; min-width: 640px; font: 11px system-ui, sans-serif; fill: var(--soft) }
.grid { stroke: var(--line) } .stem { stroke: var(--line); stroke-width: 2 }
circle.rtn { fill: var(--page); stroke: var(--rtn); stroke-width: 1.5 } circle.stored { fill: var(--stored) }
.key { white-space: nowrap; margin-right: 1.2rem } .key i { display: inline-block; width: .7em; height: .7em;
  border-radius: 50%; margin-right: .4em } i.rtn { border: 2px solid var(--rtn) } i.stored { background: var(--stored) }
"""
