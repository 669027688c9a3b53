"""Rows of a data set as tokens to train on: conversations through the chat template, of which answers count."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax.convert.text import TokenizerLike, ids_of
from awq_jax.data import sources
from awq_jax.errors import CalibrationError
from awq_jax.serve import prompts

ANSWERS = ("completion", "response", "output", "answer")
QUESTIONS = ("prompt", "instruction", "question")


@dataclasses.dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
      ids: int32 ``[T]``.
      counts: bool ``[T]``: whether the token is one to learn, as those of a prompt are not.
    """

    ids: np.ndarray
    counts: np.ndarray


def read(path: Path, tokenizer: TokenizerLike | None, length: int) -> tuple[list[Row], int]:
    """The rows of a ``.jsonl``, ``.json`` or ``.parquet`` file, and how many were cut to ``length`` tokens.

    A row has ``messages``; or a prompt (``prompt``, ``instruction`` with ``input``, ``question``) and an answer
    (``completion``, ``response``, ``output``, ``answer``); or ``text``, all of which is learnt.

    Raises:
      CalibrationError: the file cannot be read, or a row is none of these or has nothing to learn; with its number.
      ConfigError: there is no tokenizer, or no chat template for conversations.
    """
    tokenizer = prompts.needed(tokenizer)
    rows, cut = [], 0
    for number, given in enumerate(sources.read_file(path), 1):
        if not isinstance(given, Mapping):
            raise CalibrationError(f"{path} row {number} is no object with messages, a prompt and an answer, or a text")
        try:
            row = _row(given, tokenizer)
        except CalibrationError as e:
            raise CalibrationError(f"{path} row {number}: {e}") from None
        if len(row.ids) > length:
            row, cut = Row(row.ids[:length], row.counts[:length]), cut + 1
        if row.counts[1:].any():
            rows.append(row)
    if not rows:
        raise CalibrationError(f"{path} has no row with a token to learn within {length} tokens")
    return rows, cut


def parted(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and the last 5% of them, at most 64, to measure the loss on."""
    count = len(rows) - min(64, len(rows) // 20)
    return list(rows[:count]), list(rows[count:])


def _row(given: Mapping[str, Any], tokenizer: TokenizerLike) -> Row:
    talk = given.get("messages") or given.get("conversations")
    if talk:
        return _talk(talk, tokenizer)
    answer = next((given[k] for k in ANSWERS if isinstance(given.get(k), str)), None)
    question = next((given[k] for k in QUESTIONS if isinstance(given.get(k), str)), None)
    if question is not None and answer is not None:
        more = given.get("input")
        question = f"{question}\n\n{more}" if isinstance(more, str) and more else question
        if tokenizer.chat_template:
            return _talk([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenizer)
        first, whole = ids_of(tokenizer, [question, question + answer])
        ids = [*whole, *_end(tokenizer)]
        return _learnt(ids, [(_common(first, ids), len(ids))])
    if isinstance(given.get("text"), str):
        [ids] = ids_of(tokenizer, [given["text"]])
        ids = [*ids, *_end(tokenizer)]
        return _learnt(ids, [(0, len(ids))])
    raise CalibrationError(f"it has {', '.join(map(str, given)) or 'nothing'}, and no messages, answer or text")


def _talk(talk: Sequence[Mapping[str, Any]], tokenizer: TokenizerLike) -> Row:
    """A conversation; what its assistant says counts, the end of each turn included."""
    if not isinstance(talk, Sequence) or not all(isinstance(m, Mapping) and m.get("role") for m in talk):
        raise CalibrationError("messages are no list of {role, content}")
    turns = [{**m, "content": m.get("content") or ""} for m in talk]
    if not any(m["role"] == "assistant" for m in turns):
        raise CalibrationError("no message is the assistant's: there is nothing to learn")
    prompts.encode(tokenizer, turns[:1], True)  # says so if there is no template

    def ids(messages: list[Any], begins: bool) -> list[int]:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=begins, return_dict=False))

    whole = ids(turns, False)
    spans = []
    for i, message in enumerate(turns):
        if message["role"] == "assistant":
            start = _common(ids(turns[:i], True), whole) if i else 0
            spans.append((start, _common(ids(turns[: i + 1], False), whole)))
    return _learnt(whole, spans)


def _learnt(ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> Row:
    counts = np.zeros(len(ids), bool)
    for start, stop in spans:
        counts[start:stop] = True
    return Row(np.asarray(ids, np.int32), counts)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _end(tokenizer: TokenizerLike) -> list[int]:
    end = getattr(tokenizer, "eos_token_id", None)
    return [] if end is None else [int(end)]


def packed(rows: Sequence[Row], length: int) -> list[Row]:
    """Short rows one after another, up to ``length`` tokens: each sees those before it, and none predicts the next."""
    out: list[Row] = []
    ids: list[np.ndarray] = []
    counts: list[np.ndarray] = []

    def close() -> None:
        if ids:
            out.append(Row(np.concatenate(ids), np.concatenate(counts)))
            ids.clear()
            counts.clear()

    for row in rows:
        if sum(map(len, ids)) + len(row.ids) > length:
            close()
        own = row.counts.copy()
        own[:1] = False
        ids.append(row.ids)
        counts.append(own)
    close()
    return out


def batches(rows: Sequence[Row], size: int, accumulate: int, seed: int, start: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches without end from number ``start`` on, ``ids`` int32 and ``counts`` float32 ``[accumulate, size, T]``.

    The rows are shuffled in each epoch; a batch depends on ``seed`` and its number only.
    """
    need, order = size * accumulate, _Order(len(rows), seed)
    while True:
        yield collated([rows[order.at(start * need + i)] for i in range(need)], accumulate)
        start += 1


class _Order:
    """The order of rows, epoch by epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed, self._epoch, self._shuffled = count, seed, -1, np.arange(0)

    def at(self, number: int) -> int:
        epoch, place = divmod(number, self._count)
        if epoch != self._epoch:
            self._epoch, self._shuffled = epoch, np.random.default_rng([self._seed, epoch]).permutation(self._count)
        return int(self._shuffled[place])


def collated(rows: Sequence[Row], accumulate: int = 1) -> dict[str, np.ndarray]:
    """Rows as one batch, padded on the right to a power of two of at least 32 tokens."""
    width = max(32, 1 << (max(len(r.ids) for r in rows) - 1).bit_length())
    ids, counts = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], counts[i, : len(row.ids)] = row.ids, row.counts
    counts[:, 0] = 0  # nothing predicts it
    shape = (accumulate, len(rows) // accumulate, width)
    return {"ids": ids.reshape(shape), "counts": counts.reshape(shape)}
