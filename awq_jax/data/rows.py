"""Rows of a data set as documents: which column is read, and how a row becomes a text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date

import numpy as np

from awq_jax.convert.text import TextTokenizer
from awq_jax.errors import CalibrationError, Setting

LOOKED_AT = 128  # rows that decide which column is read
MANY = 20_000  # of a set that is not in memory: more rows are not read all
TALKS = ("messages", "conversations")  # before other columns of conversations
TEXTS = ("text", "content", "document", "article")
TOKENS = "input_ids"
ALPACA = (("instruction",), ("input", "context"), ("output", "response"))
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}  # ShareGPT's names

TODAY = date(2024, 7, 26)  # for templates that tell the date: a run is continued on other days, on the same tokens

Document = str | list[int]
_Talk = list[dict[str, object]]  # messages with "role" and "content"


class Documents:
    """The documents of rows, one after another; those without text are skipped.

    Args:
      items: texts, conversations (lists of messages) or rows of columns; None counts as an empty one.
      where: the source's name, for errors and `described`.
      column: which column to read; None: conversations, Alpaca's columns or a text, whichever there is first.
      tokenizer: conversations go through its chat template; without one their messages are joined.

    Attributes:
      described: the source's name, with the column that is read.
      skipped: rows skipped so far.

    Raises:
      CalibrationError: there are no rows, or no column that is known to hold text; while they are read, if one has
        something else than the first ones have, or if none has text.
    """

    def __init__(
        self, items: Iterable[object], where: str, column: str | None = None, tokenizer: TextTokenizer | None = None
    ) -> None:
        self._rest = iter(items)
        self._first = list(itertools.islice(self._rest, LOOKED_AT))
        if not self._first:
            raise CalibrationError(f"{where} is empty: it has no rows")
        self._where, self._tokenizer, self._refusal = where, tokenizer, ""
        self.described, self.skipped = where, 0
        rows = [r for r in self._first if isinstance(r, Mapping)]
        self._column: str | None = None
        self._alpaca = False
        if rows:
            self._column = _choose(rows, where, column)
            self._alpaca = column is None and self._column == ALPACA[0][0]
            how = ""
            if _is_talk(rows, self._column) or self._alpaca:
                how = " through the chat template" if getattr(tokenizer, "chat_template", None) else ", messages joined"
            what = "Alpaca's columns" if self._alpaca else f"column {self._column!r}"
            self.described += f", {what}{how}"
        else:
            refuse_column(where, column)

    def __iter__(self) -> Iterator[Document]:
        number = 0
        for number, row in enumerate(itertools.chain(self._first, self._rest), 1):
            document = self._read(row, number)
            if (isinstance(document, str) and not document.strip()) or not document:
                self.skipped += 1
            else:
                yield document
        if self.skipped == number:
            raise CalibrationError(f"{self.described} has no text: all {number} rows are empty{self._refusal}")

    def _read(self, row: object, number: int) -> Document:
        value = row
        if self._column is not None and row is not None:
            if not isinstance(row, Mapping):
                raise CalibrationError(f"{self._where} row {number} has no columns but is of type {type(row).__name__}")
            value = row.get(self._column)
            if self._alpaca and (parts := _alpaca(row)):
                asked, answer = "\n\n".join(p for p in parts[:2] if p), parts[2]
                value = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                value = value if asked and answer else None
        if isinstance(value, str):
            return value
        if not _is_something(value):
            return ""
        if (talk := _talk(value)) is not None:
            return self._render(talk)
        if self._column is not None and (ids := _ids(value, row)) is not None:
            return ids
        column = "" if self._column is None else f" in column {self._column!r}"
        raise CalibrationError(f"{self._where} row {number} has no text{column} but {type(value).__name__}")

    def _render(self, talk: _Talk) -> str:
        """A conversation as text, through the chat template if there is one; "" if it does not take it."""
        said = [str(m["content"]).strip() for m in talk if m["content"]]
        apply = getattr(self._tokenizer, "apply_chat_template", None)
        if not said or apply is None or not getattr(self._tokenizer, "chat_template", None):
            return "\n\n".join(said)
        in_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in talk]
        for messages in (talk, in_parts):  # some templates read nothing but parts, and drop a text silently
            try:
                text = str(apply(messages, tokenize=False, add_generation_prompt=False, today=TODAY))
            except Exception as e:  # transformers passes on whatever a template raises
                self._refusal = f"; {str(e)[:300]}"
                continue
            if any(s in text for s in said):
                bos = getattr(self._tokenizer, "bos_token", None)
                return text.removeprefix(bos) if bos and self._adds_bos() else text
        return ""

    def _adds_bos(self) -> bool:
        assert self._tokenizer is not None
        ids = self._tokenizer([""], verbose=False)["input_ids"][0]
        return len(ids) > 0 and ids[0] == getattr(self._tokenizer, "bos_token_id", None)


def given(source: object, seed: int) -> object:
    """Data that a caller hands over as texts, conversations or rows one after another; else as they are.

    Args:
      source: a data set of `datasets` (one that is streamed comes back as an iterator), a dict of such by split, a dict
        of columns, a table of pandas, polars or pyarrow, or anything else.
      seed: picks the rows of a set of many.

    Raises:
      CalibrationError: a dict of something else, or of several splits without "train".
    """
    if hasattr(source, "to_pylist"):  # pyarrow
        return source.to_pylist()
    columns = getattr(source, "columns", None)
    if columns is not None and not callable(columns) and hasattr(source, "__getitem__"):  # pandas, polars
        source = {str(c): list(source[c]) for c in columns}
    if isinstance(source, Mapping):
        return _of_dict(source, seed)
    if hasattr(source, "column_names") and hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        if len(source) > MANY:
            return (source[int(i)] for i in np.random.default_rng(seed).permutation(len(source)))
        return list(source)  # type: ignore[call-overload]
    if isinstance(source, Iterable) and not hasattr(source, "__len__"):
        items = iter(source)
        first = list(itertools.islice(items, 1))
        whole = itertools.chain(first, items)
        return whole if first and isinstance(first[0], Mapping) else list(whole)
    return source


def refuse_column(where: str, column: str | None) -> None:
    """Raise `CalibrationError` if a column is asked for, of what has none."""
    if column is not None:
        pick = Setting("column", column, "calib-column")
        raise CalibrationError(f"{where} has no columns: leave {pick} out", pick)


def are_rows(items: Sequence[object]) -> bool:
    """Whether these are texts, conversations or rows (or null), rather than token lists."""
    return all(x is None or isinstance(x, str | Mapping) or _talk(x) is not None for x in items)


def _of_dict(source: Mapping[object, object], seed: int) -> object:
    names, values = list(source), list(source.values())
    if values and all(hasattr(v, "column_names") or _are_mappings(v) for v in values):  # by split
        split = names[0] if len(names) == 1 else "train"
        if split not in source:
            raise CalibrationError(f"the data have the splits {names}; pass one of them: data[{names[0]!r}]")
        return given(source[split], seed)
    columns = [v for v in values if isinstance(v, Sequence | np.ndarray) and not isinstance(v, str | bytes)]
    if not values or len(columns) < len(values) or len({len(c) for c in columns}) > 1:
        kinds = ", ".join(f"{n!r}: {type(v).__name__}" for n, v in itertools.islice(source.items(), 9))
        raise CalibrationError(f"the calibration data are a dict of {{{kinds}}}; pass rows, or columns of one length")
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _are_mappings(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _choose(rows: Sequence[Mapping[object, object]], where: str, column: str | None) -> str:
    names = list(dict.fromkeys(str(k) for row in rows for k in row))
    if column is not None:
        if column not in names:
            raise CalibrationError(f"{where} has no column {column!r}; it has {', '.join(names)}")
        return column
    talks = [n for n in names if _is_talk(rows, n)]
    for name in TALKS:
        if name in talks:
            return name
    if len(talks) == 1:
        return talks[0]
    if any(_alpaca(row) for row in rows):
        return ALPACA[0][0]
    lengths = {n: sum(len(v) for row in rows if isinstance(v := row.get(n), str)) for n in names}
    for name in TEXTS:
        if lengths.get(name):
            return name
    if any(_ids(row.get(TOKENS), row) for row in rows):
        return TOKENS
    empty = [n for n in (*TALKS, *TEXTS) if n in names and not any(map(_is_something, (row.get(n) for row in rows)))]
    if empty:
        return empty[0]  # text may follow, and rows without any are counted
    told = f"{where} has no column that is known to hold text; it has {', '.join(names) or 'none'}"
    best = (talks or [max(names, key=lambda n: lengths[n], default="")])[0]
    if not talks and not lengths.get(best):
        raise CalibrationError(told)
    pick = Setting("column", best, "calib-column")
    raise CalibrationError(f"{told}: pick one, such as {pick}", pick)


def _is_something(value: object) -> bool:
    """Whether a cell is not null (pandas' are NaN and NA), nor an empty text or list."""
    if isinstance(value, str | list | tuple):
        return len(value) > 0
    null = value is None or type(value).__name__ == "NAType"
    return not null and not (isinstance(value, float) and math.isnan(value))


def _is_talk(rows: Sequence[Mapping[object, object]], name: str) -> bool:
    return any(_talk(row.get(name)) for row in rows)


def _alpaca(row: Mapping[object, object]) -> list[str]:
    """Instruction, input and output of a row; empty if it has no such columns."""
    found = [next((row[n] for n in names if n in row), None) for names in ALPACA]
    there = [any(n in row for n in names) for names in ALPACA]
    if not (there[0] and there[2]) or not all(v is None or isinstance(v, str) for v in found):
        return []
    return [str(v or "").strip() for v in found]


def _talk(value: object) -> _Talk | None:
    """Messages as ``role`` and ``content``, a text; None if that is no conversation."""
    if isinstance(value, Mapping) and value and all(isinstance(v, list | np.ndarray) for v in value.values()):
        value = [dict(zip(value, m, strict=False)) for m in zip(*value.values(), strict=False)]  # columns of messages
    if not isinstance(value, list | tuple | np.ndarray) or not len(value):
        return None
    talk: _Talk = []
    for message in value:
        if not isinstance(message, Mapping):
            return None
        role = message.get("role", message.get("from"))
        key = next((k for k in ("content", "value", "text") if k in message), None)
        content = message.get(key)
        if isinstance(content, list | tuple | np.ndarray):
            parts = [p.get("text") if isinstance(p, Mapping) else p for p in content]
            content = "\n".join(p for p in parts if isinstance(p, str))
        if not isinstance(role, str) or not isinstance(content, str | None) or not (key or "tool_calls" in message):
            return None
        other = {str(k): v for k, v in message.items() if k not in ("role", "from", key) and v is not None}
        talk.append({"role": ROLES.get(role, role), "content": content or "", **other})
    return talk


def _ids(value: object, row: object) -> list[int] | None:
    """Token ids of a row, those of padding left out; None if it has none."""
    if not isinstance(value, list | tuple | np.ndarray) or not all(isinstance(i, int | np.integer) for i in value):
        return None
    mask = row.get("attention_mask") if isinstance(row, Mapping) else None
    return [int(i) for i, m in zip(value, value if mask is None else mask, strict=False) if mask is None or m]
