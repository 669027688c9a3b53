"""Where calibration and evaluation text comes from: local files, `datasets` sets, Python's own documentation."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from awq_jax.data import rows
from awq_jax.errors import INSTALL, CalibrationError, Setting

BUILTIN = ("builtin", "default")  # the text that needs no network; the second is its former name
USE = Setting("calib", BUILTIN[0])
LOCAL = f"pass {USE} (Python's own documentation, no network) or a .txt, .jsonl or .parquet file"
SEPARATORS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".parquet", *SEPARATORS, ".npy")

Row = Mapping[str, Any]  # of a data set: some column holds the text
# alias -> (repository, configuration, split)
DATASETS: dict[str, tuple[str, str | None, str]] = {
    "pileval": ("mit-han-lab/pile-val-backup", None, "validation"),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    "c4": ("allenai/c4", "en", "train"),
}


def known() -> str:
    """The sources a name may stand for, for error messages."""
    return ", ".join((BUILTIN[0], *DATASETS, "hf:OWNER/NAME[:CONFIG[:SPLIT]]")) + f", or a {'/'.join(SUFFIXES)} file"


def default_documents() -> list[str]:
    """The help topics that ship with Python: about half a megabyte of English, no network.

    Raises:
      CalibrationError: if this Python was built without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CalibrationError(
            "this Python has no pydoc_data.topics, the built-in text; pass a .txt file instead"
        ) from None
    return [topics[name] for name in sorted(topics)]


def read_file(path: Path) -> list[object]:
    """What is in a local file: one text, or the rows of a table or of JSON.

    Raises:
      CalibrationError: if the file is missing, unreadable, or not what its name says.
    """
    try:
        if path.is_file() and not path.stat().st_size:
            raise CalibrationError(f"{path} is empty: it has no rows and no text")
        if path.suffix in (".jsonl", ".ndjson"):
            return list(_jsonl_rows(path))
        if path.suffix == ".parquet":
            return list(_parquet_rows(path))
        # utf-8-sig: a mark at the start, as Windows writes it, is no text.
        with path.open(encoding="utf-8-sig", newline=None if path.suffix not in SEPARATORS else "") as f:
            if path.suffix == ".json":
                return _json_rows(json.load(f), path)
            if path.suffix in SEPARATORS:
                csv.field_size_limit(1 << 30)
                return list(csv.DictReader(f, delimiter=SEPARATORS[path.suffix]))
            return [f.read()]
    except json.JSONDecodeError as e:
        raise CalibrationError(f"{path} is not JSON: {e}") from None
    except csv.Error as e:
        raise CalibrationError(f"{path} is not a table: {e}") from None
    except FileNotFoundError:
        raise CalibrationError(f"{path} does not exist") from None
    except UnicodeDecodeError as e:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {e.start})") from None
    except OSError as e:
        raise CalibrationError(f"cannot read {path}: {e.strerror or e}") from None


def stream(name: str, seed: int = 0, load_dataset: Callable[..., Iterable[Row]] | None = None) -> Iterator[object]:
    """Rows of a `datasets` set, downloaded as they are consumed.

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
                f"calibration set {name!r} needs the `datasets` package: {INSTALL}; or {LOCAL}", USE
            ) from None
    try:
        assert load_dataset is not None
        found: Any = load_dataset(repository, config, split=split, streaming=True)
        if name != "wikitext" and hasattr(found, "shuffle"):
            found = found.shuffle(seed=seed, buffer_size=1000)
        yield from _articles(row["text"] for row in found) if name == "wikitext" else found
    except Exception as e:  # whatever the network stack raises: the user needs the remedy, not the stack
        what = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise CalibrationError(f"cannot load calibration set {name!r} ({repository}): {what}; {LOCAL}", USE) from e


def _resolve(name: str) -> tuple[str, str | None, str]:
    if name in DATASETS:
        return DATASETS[name]
    repository, *rest = name.removeprefix("hf:").split(":")
    config = rest[0] if rest and rest[0] else None
    return repository, config, rest[1] if len(rest) > 1 else "train"


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText rows are lines: join them into articles, which start at a heading of one ``=``."""
    article: list[str] = []
    for line in lines:
        if any(article) and re.match(r"^ = [^=]", line):
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)


def _json_rows(content: object, path: Path) -> list[object]:
    try:
        found = rows.given(content, 0)
    except CalibrationError as e:
        raise CalibrationError(f"{path}: {e}") from None
    return found if isinstance(found, list) else [found]


def _jsonl_rows(path: Path) -> Iterator[object]:
    with path.open(encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as e:
                raise CalibrationError(f"{path} line {number} is not JSON: {e.msg}") from None


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
