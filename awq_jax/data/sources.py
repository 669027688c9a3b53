"""Where calibration and evaluation text comes from: local files, `datasets` sets, Python's own documentation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from awq_jax.errors import CalibrationError

LOCAL = "use --calib default (Python's own documentation, no network) or a .txt, .jsonl or .parquet file"
TEXT_FIELDS = ("text", "content", "document", "article")
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet", ".npy")

Row = Mapping[str, Any]  # of a data set: some field holds the text
# alias -> (repository, configuration, split)
DATASETS: dict[str, tuple[str, str | None, str]] = {
    "pileval": ("mit-han-lab/pile-val-backup", None, "validation"),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    "c4": ("allenai/c4", "en", "train"),
}


def known() -> str:
    """The sources a name may stand for, for error messages."""
    return ", ".join((*DATASETS, "default", "hf:OWNER/NAME[:CONFIG[:SPLIT]]")) + f", or a {'/'.join(SUFFIXES)} file"


def default_documents() -> list[str]:
    """The help topics that ship with Python: about half a megabyte of English, no network.

    Raises:
      CalibrationError: if this Python was built without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CalibrationError(
            "this Python has no pydoc_data.topics, the default text; pass a .txt file instead"
        ) from None
    return [topics[name] for name in sorted(topics)]


def read_file(path: Path) -> list[str]:
    """The documents of a local file: one for text, one per row for ``.jsonl`` and ``.parquet``.

    The text field of rows is ``text``, ``content``, ``document`` or ``article``, whichever is there
    first, else the string field that is longest on average over the first rows.

    Raises:
      CalibrationError: if the file is missing, unreadable, or has no text.
    """
    try:
        if path.suffix == ".jsonl":
            return _texts_of(_jsonl_rows(path), path)
        if path.suffix == ".parquet":
            return _texts_of(_parquet_rows(path), path)
        return [path.read_text(encoding="utf-8")]
    except FileNotFoundError:
        raise CalibrationError(f"{path} does not exist") from None
    except UnicodeDecodeError as e:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {e.start})") from None
    except OSError as e:
        raise CalibrationError(f"cannot read {path}: {e.strerror or e}") from None


def stream(name: str, seed: int = 0, load_dataset: Callable[..., Iterable[Row]] | None = None) -> Iterator[str]:
    """Documents of a `datasets` set, downloaded as they are consumed.

    Args:
      name: an alias of `DATASETS` or ``hf:OWNER/NAME[:CONFIG[:SPLIT]]``.
      seed: of the shuffle buffer.
      load_dataset: stands in for ``datasets.load_dataset``.

    Raises:
      CalibrationError: if `datasets` is not installed, or the set cannot be reached.
    """
    repository, config, split = _resolve(name)
    if load_dataset is None:
        try:
            from datasets import load_dataset  # type: ignore[no-redef]
        except ImportError:
            raise CalibrationError(
                f"calibration set {name!r} needs the `datasets` package: pip install 'awq-jax[data]', or {LOCAL}"
            ) from None
    try:
        assert load_dataset is not None
        rows: Any = load_dataset(repository, config, split=split, streaming=True)
        if name != "wikitext" and hasattr(rows, "shuffle"):
            rows = rows.shuffle(seed=seed, buffer_size=1000)
        texts = _field(iter(rows), name)
        yield from _articles(texts) if name == "wikitext" else texts
    except CalibrationError:
        raise
    except Exception as e:  # whatever the network stack raises: the user needs the remedy, not the stack
        what = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise CalibrationError(f"cannot load calibration set {name!r} ({repository}): {what}; {LOCAL}") from e


def _resolve(name: str) -> tuple[str, str | None, str]:
    if name in DATASETS:
        return DATASETS[name]
    repository, *rest = name.removeprefix("hf:").split(":")
    config = rest[0] if rest and rest[0] else None
    return repository, config, rest[1] if len(rest) > 1 else "train"


def _field(rows: Iterator[Row], where: str) -> Iterator[str]:
    first = next(rows, None)
    if first is None:
        raise CalibrationError(f"calibration set {where!r} is empty")
    field = _text_field([first], where)
    yield first[field]
    for row in rows:
        yield row[field]


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText rows are lines: join them into articles, which start at a heading of one ``=``."""
    article: list[str] = []
    for line in lines:
        if article and re.match(r"^ = [^=]", line):
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise CalibrationError(f"{path} line {number} is not JSON: {e.msg}") from None
            yield {"text": row} if isinstance(row, str) else row


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError:
        raise CalibrationError(f"reading {path} needs pyarrow: pip install pyarrow, or pass .txt or .jsonl") from None
    try:
        with pq.ParquetFile(path) as f:
            for batch in f.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as e:
        raise CalibrationError(f"{path} is not a readable parquet file: {str(e).splitlines()[0]}") from None


def _texts_of(rows: Iterable[object], path: Path) -> list[str]:
    rows = list(rows)
    if not rows:
        raise CalibrationError(f"{path} has no rows")
    field = _text_field(rows[:32], str(path))
    out = []
    for number, row in enumerate(rows, 1):
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise CalibrationError(f"{path} row {number} has no text in field {field!r}")
        out.append(text)
    return out


def _text_field(rows: Sequence[object], where: str) -> str:
    lengths: dict[str, int] = {}
    for row in rows:
        for key, value in row.items() if isinstance(row, dict) else ():
            if isinstance(value, str):
                lengths[key] = lengths.get(key, 0) + len(value)
    for field in TEXT_FIELDS:
        if field in lengths:
            return field
    if not lengths:
        seen = sorted(rows[0]) if isinstance(rows[0], dict) else type(rows[0]).__name__
        raise CalibrationError(f"{where} has no text field; the first row has {seen}")
    return max(lengths, key=lambda key: lengths[key])
