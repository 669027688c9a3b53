"""The README's tables (conversions, engines) are what the code does. ``python tests/test_readme.py`` writes them."""

from __future__ import annotations

import re
from pathlib import Path

from awq_jax.convert import exactness
from awq_jax.convert.engines import verdicts
from awq_jax.convert.registry import FORMATS

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- conversions -->\n).*?(<!-- /conversions -->)", re.DOTALL)
ENGINES = re.compile(r"(<!-- engines -->\n).*?(<!-- /engines -->)", re.DOTALL)


def table() -> str:
    """Markdown: formats that lose the same share a row or a column."""
    grid = exactness.grid(exactness.table())
    head, *body = _merged(list(zip(*_merged(grid), strict=True)))  # sources across, targets down
    lines = ["| " + " | ".join(("to \\ from", *head[1:])) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join((f"**{name}**", *cells)) + " |" for name, *cells in body]
    return "\n".join(lines) + "\n"


def engines_table() -> str:
    """Markdown: formats that the same engines read share a row."""
    head, *rows = verdicts.table(list(FORMATS))
    kinds: dict[tuple[str, ...], list[str]] = {}
    for format, kind, *cells in rows:
        kinds.setdefault((format, *cells), []).append(kind)
    formats: dict[tuple[str, ...], list[str]] = {}
    for (format, *cells), found in kinds.items():
        formats.setdefault(("; ".join(found), *cells), []).append(f"`{format}`")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join((", ".join(names), *cells)) + " |" for cells, names in formats.items()]
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


def test_the_table_of_engines_is_current() -> None:
    found = ENGINES.search(README.read_text())
    assert found, "README.md has no <!-- engines --> block"
    assert found[0] == f"<!-- engines -->\n{engines_table()}<!-- /engines -->"


def test_every_format_is_named() -> None:
    text = README.read_text()
    assert [name for name in FORMATS if f"`{name}`" not in text] == []


if __name__ == "__main__":
    text = BLOCK.sub(lambda m: m[1] + table() + m[2], README.read_text())
    README.write_text(ENGINES.sub(lambda m: m[1] + engines_table() + m[2], text))
