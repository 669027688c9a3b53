"""The README's table of conversions is what the code does. ``python tests/test_readme.py`` rewrites it."""

from __future__ import annotations

import re
from pathlib import Path

from awq_jax.convert import exactness
from awq_jax.convert.registry import FORMATS

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- conversions -->\n).*?(<!-- /conversions -->)", re.DOTALL)


def table() -> str:
    """Markdown: formats that lose the same share a row or a column."""
    grid = exactness.grid(exactness.table())
    head, *body = _merged(list(zip(*_merged(grid), strict=True)))  # sources across, targets down
    lines = ["| " + " | ".join(("to \\ from", *head[1:])) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join((f"**{name}**", *cells)) + " |" for name, *cells in body]
    return "\n".join(lines) + "\n"


def _merged(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    head, *body = rows
    names: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in body:
        names.setdefault(tuple(cells), []).append(name)
    return [head, *((", ".join(group), *cells) for cells, group in names.items())]


def test_the_table_is_current() -> None:
    found = BLOCK.search(README.read_text())
    assert found, "README.md has no <!-- conversions --> block"
    assert found[0] == f"<!-- conversions -->\n{table()}<!-- /conversions -->"


def test_every_format_is_named() -> None:
    text = README.read_text()
    assert [name for name in FORMATS if f"`{name}`" not in text] == []


if __name__ == "__main__":
    README.write_text(BLOCK.sub(lambda m: m[1] + table() + m[2], README.read_text()))
