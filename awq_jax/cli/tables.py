"""A quantization `Report` for people: one self-contained HTML page (`awq_jax.report` makes the text)."""

from __future__ import annotations

import html as _html
from collections.abc import Mapping, Sequence

from awq_jax.cli import chart
from awq_jax.report import LayerReport, Report, notes_of, number, shape_text, size, summary


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
    for heading, notes in notes_of(report):
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


def _weights(layers: Sequence[LayerReport]) -> str:
    head = ("", "weight", "shape", "bits", "group", "size", "rounded", "stored", "left", "ratio", "clipped", "scale")
    rows = []
    for i, r in enumerate(layers, 1):
        left = r.error / r.error_rtn if r.error is not None and r.error_rtn else None
        worse = ' class="worse"' if left is not None and left > 1 else ""
        cells = (
            str(i),
            r.path,
            shape_text(r.shape),
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
