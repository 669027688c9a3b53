"""Calibration data: tokens ``[S, T]`` from any source of text or tokens, with an account of what was used."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from awq_jax.config import SAMPLES, SEQ_LEN
from awq_jax.convert.text import Message, TextTokenizer, ids_of
from awq_jax.data import rows, sources, tokens
from awq_jax.data.sources import Row
from awq_jax.data.tokens import check as check_tokens
from awq_jax.errors import CalibrationError

BATCH_TOKENS = {"cpu": 512}  # by backend; what bounds the memory of activations
BATCH_TOKENS_ELSEWHERE = 8192
_Excerpt = tuple[int, str]  # the number of a document, and some of its text
_Encoded = tuple[int, np.ndarray, str]  # of an excerpt: the document's number, tokens [t], the text they stand for
SHOWN = 60  # characters of the text that the description shows


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Token sequences of one length, and where they came from.

    Attributes:
      tokens: int32 ``[S, T]``.
      description: one line for the user: source and column, sizes, what was left over, how the text begins.
      documents: documents of which at least one token was used.
      left_documents: documents read of which nothing was used.
      left_tokens: tokens encoded but not used (less than one sequence, or past the last one).
      left_characters: characters read but not encoded, because there were tokens enough.
      skipped: rows read that are null or empty.
    """

    tokens: np.ndarray
    description: str
    documents: int = 0
    left_documents: int = 0
    left_tokens: int = 0
    left_characters: int = 0
    skipped: int = 0

    @property
    def used_tokens(self) -> int:
        """``S * T``."""
        return int(self.tokens.size)

    def batches(self, batch_size: int | None = None) -> list[np.ndarray]:
        """``tokens`` in batches of at most ``batch_size`` sequences; none is dropped.

        Without a ``batch_size`` a batch has as many as make 512 tokens on a CPU, and 8192 elsewhere.

        Raises:
          CalibrationError: if ``batch_size`` is below 1.
        """
        if batch_size is None:
            import jax  # takes seconds to start, and texts alone do not need it

            tokens = BATCH_TOKENS.get(jax.default_backend(), BATCH_TOKENS_ELSEWHERE)
            batch_size = max(1, tokens // self.tokens.shape[1])
        if batch_size < 1:
            raise CalibrationError(f"batch_size must be at least 1; got {batch_size}")
        return [self.tokens[i : i + batch_size] for i in range(0, len(self.tokens), batch_size)]


def default(needed: bool) -> str | CalibrationSet:
    """What is calibrated on where nothing is said: the built-in text, or `NOTHING` where no statistics are needed."""
    return sources.BUILTIN[0] if needed else NOTHING


NOTHING = CalibrationSet(np.zeros((0, 1), np.int32), "no calibration: rounding to nearest needs none")

# see `load`
CalibrationSource = str | Path | CalibrationSet | Iterable[str | Row | Sequence[Message]] | npt.ArrayLike


def load(
    source: CalibrationSource,
    tokenizer: TextTokenizer | None = None,
    *,
    samples: int = SAMPLES,
    seq_len: int = SEQ_LEN,
    vocab_size: int | None = None,
    seed: int = 0,
    column: str | None = None,
    bos: str = "auto",
) -> CalibrationSet:
    """Calibration tokens from ``source``.

    Long texts are cut, short ones packed one after another with the tokenizer's end token between
    them (if it has one); sequences may start in the middle of a text, and each begins as the model's input does:
    with BOS, where the tokenizer puts one, and with no other inside. Local texts are shuffled by
    ``seed`` in excerpts of about two sequences, so that few samples still see the whole source.
    If there are fewer tokens than one sequence, that one sequence is shorter; if there are fewer
    than ``samples`` sequences, all are used. ``description`` says so.

    Args:
      source: ``"builtin"`` (the text of Python's help topics, no network); ``"pileval"``, ``"wikitext"``, ``"c4"`` or
        ``"hf:OWNER/NAME[:CONFIG[:SPLIT]]"`` (read with `datasets`, streamed); a path to ``.txt``, ``.md``,
        ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.npy``; a list of strings, of conversations or of rows; a
        data set of `datasets`, a dict of columns, or a table of pandas, polars or pyarrow; token lists or one
        of them (packed like texts); an integer array ``[S, T]``, used whole and as it stands; or a `CalibrationSet`,
        returned after the vocabulary check.
      tokenizer: a model's, or one of transformers; required for text.
      samples: sequences wanted.
      seq_len: tokens per sequence.
      vocab_size: tokens must lie in ``[0, vocab_size)``; None checks only the lower bound.
      seed: of the shuffle.
      column: of rows. None takes the first of these that there is: conversations (``messages``, ``conversations``),
        which go through the tokenizer's chat template if it has one; Alpaca's ``instruction``, ``input`` and
        ``output``, as a conversation; ``text``, ``content``, ``document`` or ``article``; ``input_ids``.
      bos: whether each sequence begins with BOS, and ``seq_len`` counts it: ``"auto"`` (where the tokenizer puts it
        before a text), ``"yes"`` or ``"no"``. An array ``[S, T]`` stays as it is.

    Raises:
      ConfigError: ``bos`` is none of these, or ``"yes"`` where the tokenizer has none.
      CalibrationError: if the source is unknown, unreachable, unreadable or empty, if rows have no such column (it
        names those they have), if text comes without a tokenizer, or if a token lies outside the vocabulary.
    """
    if samples < 1 or seq_len < 1:
        raise CalibrationError(f"samples and seq_len must be at least 1; got {samples} and {seq_len}")
    if seed < 0:
        raise CalibrationError(f"seed must be 0 or more; got {seed}")
    tokens.check_bos(bos)
    if source is NOTHING:
        return NOTHING
    if isinstance(source, CalibrationSet):
        rows.refuse_column("a calibration set", column)
        check_tokens(source.tokens, vocab_size, "the calibration set")
        return source
    if isinstance(source, str):
        check_source(source)
    named = isinstance(source, str | Path)
    name = "Python help topics" if named and source in sources.BUILTIN else str(source) if named else "given texts"
    items = _items(source, seed)
    if isinstance(items, np.ndarray) and items.ndim == 2:
        rows.refuse_column("an array of tokens", column)
        return _as_given(items, vocab_size)
    eos, begin = getattr(tokenizer, "eos_token_id", None), tokens.beginning(tokenizer, bos)
    if seq_len <= len(begin.ids):
        raise CalibrationError(f"sequences of {seq_len} tokens hold nothing but {begin.text}: take longer ones")
    pack = functools.partial(_pack, begin=begin, eos=eos, samples=samples, seq_len=seq_len, vocab_size=vocab_size)
    if isinstance(items, np.ndarray) and (items.ndim != 1 or items.dtype.kind not in "OTU"):
        items = [items]
    items = items if isinstance(items, Iterator) else list(items) if isinstance(items, Iterable) else []
    if isinstance(items, list) and items and all(isinstance(i, int | np.integer) for i in items):
        items = [items]  # one document of tokens
    if isinstance(items, list) and not rows.are_rows(items):
        rows.refuse_column(name, column)
        return pack([(i, tokens.of_document(d, i), "") for i, d in enumerate(items)], "given tokens", len(items))
    read = rows.Documents(items, name, column, tokenizer)
    if isinstance(items, Iterator):
        return pack(_encode(enumerate(read), tokenizer, name), read.described, rows=read)
    documents = list(read)
    texts = [d for d in documents if isinstance(d, str)]
    if len(texts) < len(documents):
        return pack(_encode(enumerate(documents), tokenizer, name), read.described, len(documents), rows=read)
    shuffled = _excerpts(texts, 8 * seq_len, seed)
    total, characters = len({i for i, _ in shuffled}), sum(len(t) for _, t in shuffled)
    return pack(_encode(shuffled, tokenizer, name), read.described, total, characters, rows=read)


def read_texts(source: str, tokenizer: TextTokenizer | None, column: str | None = None) -> tuple[str, list[str]]:
    """All documents of a file or of the built-in text, and a line that says what was read.

    Raises:
      CalibrationError: see `load`.
    """
    check_source(source)
    items = _items(source, 0)
    if not isinstance(items, list):
        raise CalibrationError(f"{source} is not a file of text")
    read = rows.Documents(items, source, column, tokenizer)
    texts = [d for d in read if isinstance(d, str)]
    if not texts:
        raise CalibrationError(f"{read.described} holds tokens: a text is needed")
    return read.described + _remarks(read.skipped, texts[0]), texts


def _items(source: object, seed: int) -> object:
    """What a source holds: an array of tokens, or texts, rows, conversations or token lists; streamed: an iterator."""
    if isinstance(source, Path) or (isinstance(source, str) and _is_file(source)):
        path = Path(source)
        return tokens.read_npy(path) if path.suffix == ".npy" else sources.read_file(path)
    if isinstance(source, str):
        return sources.default_documents() if source in sources.BUILTIN else sources.stream(source, seed)
    if isinstance(source, bytes | bytearray):
        raise CalibrationError("calibration data are bytes: pass text, bytes.decode() for instance, or a path")
    items = rows.given(source, seed)
    return np.asarray(items) if hasattr(items, "ndim") else items


def check_source(source: str) -> None:
    """Refuse a name that `load` does not know or a file that is not there; reads nothing.

    Raises:
      CalibrationError: naming the known sources.
    """
    if _is_file(source):
        if not Path(source).exists():
            raise CalibrationError(f"{source} does not exist")
    elif source not in (*sources.BUILTIN, *sources.DATASETS) and not source.startswith("hf:"):
        raise CalibrationError(f"unknown calibration source {source!r}; known: {sources.known()}")


def encode(text: str, tokenizer: TextTokenizer | None) -> np.ndarray:
    """``text`` as int32 tokens ``[T]``, with the start token the tokenizer adds by itself.

    Raises:
      CalibrationError: if there is no tokenizer.
    """
    return np.asarray(ids_of(_needed(tokenizer, "text"), [text])[0], np.int32)


def _is_file(name: str) -> bool:
    with contextlib.suppress(OSError):  # longer than a file's name may be
        if len(name) <= 1000 and "\n" not in name:
            return name not in sources.DATASETS and (Path(name).is_file() or Path(name).suffix in sources.SUFFIXES)
    raise CalibrationError(f"a text of {len(name)} characters stands where a source's name belongs: pass [text]")


def _needed(tokenizer: TextTokenizer | None, source: str) -> TextTokenizer:
    if tokenizer is None:
        raise CalibrationError(
            f"{source!r} needs a tokenizer and the model has none: put tokenizer.json beside it or pass tokens"
        )
    return tokenizer


def _excerpts(documents: Sequence[str], size: int, seed: int) -> list[_Excerpt]:
    """Excerpts of at most ``size`` characters, shuffled."""
    excerpts = [(i, piece) for i, text in enumerate(documents) for piece in _cut(text, size) if piece.strip()]
    return [excerpts[i] for i in np.random.default_rng(seed).permutation(len(excerpts))]


def _cut(text: str, size: int) -> Iterator[str]:
    """Pieces of at most ``size`` characters, cut after a line or a word where there is one."""
    start = 0
    while len(text) - start > size:
        end = start + size
        for mark in ("\n", " "):
            at = text.rfind(mark, start + size // 2, end)
            if at >= 0:
                end = at + 1 if mark == "\n" else at
                break
        yield text[start:end]
        start = end
    yield text[start:]


def _encode(
    excerpts: Iterable[tuple[int, rows.Document]], tokenizer: TextTokenizer | None, source: str
) -> Iterator[_Encoded]:
    """The tokens of excerpts, 16 texts at a time; what is tokens stays."""
    excerpts = iter(excerpts)
    while batch := list(itertools.islice(excerpts, 16)):
        texts = [d for _, d in batch if isinstance(d, str)]
        encoded = iter(ids_of(_needed(tokenizer, source), texts) if texts else ())
        for i, d in batch:
            yield i, np.asarray(next(encoded) if isinstance(d, str) else d, np.int64), d if isinstance(d, str) else ""


def _pack(
    encoded: Iterable[_Encoded],
    name: str,
    total: int | None = None,
    characters: int = 0,
    *,
    rows: rows.Documents | None = None,
    begin: tokens.Beginning,
    eos: int | None,
    samples: int,
    seq_len: int,
    vocab_size: int | None,
) -> CalibrationSet:
    """Concatenate excerpts with end tokens between, and cut into sequences that begin with ``begin``.

    ``total``, ``characters``: documents and characters of all excerpts, if that is known beforehand. ``rows``: where
    they are from.
    """
    most = seq_len - len(begin.ids)  # of a sequence, after its beginning
    want, have = samples * most, 0
    chunks: list[np.ndarray] = []
    seen: set[int] = set()
    begins = ""
    for i, ids, text in encoded:
        if have >= want:
            break
        ids = begin.strip(ids)
        if chunks and eos is not None and chunks[-1][-1] != eos:
            chunks.append(np.asarray([eos], np.int32))
            have += 1
        if ids.size:
            chunks.append(ids)
            have += ids.size
            seen.add(i)
        begins, characters = begins or text, characters - len(text)
    if not have:
        raise CalibrationError(f"{name} is empty: it gave no tokens")
    flat = np.concatenate(chunks)
    check_tokens(flat, vocab_size, name)
    length = min(most, have)
    count = min(samples, have // length)
    used = begin.put(flat[: count * length].astype(np.int32).reshape(count, length))
    left_documents = 0 if total is None else total - len(seen)
    left = have - count * length
    told = _describe(name, used.shape, (samples, seq_len), len(seen), left_documents, left, max(characters, 0))
    told += f"; each sequence begins with {begin.text}" if begin.ids else ""
    skipped = 0 if rows is None else rows.skipped
    told += _remarks(skipped, begins)
    return CalibrationSet(used, told, len(seen), left_documents, left, max(characters, 0), skipped)


def _remarks(skipped: int, begins: str) -> str:
    told = f"; {skipped:,} rows without text skipped" if skipped else ""
    return told + (f"; begins {begins.strip()[:SHOWN]!r}" if begins else "")


def _describe(
    name: str,
    shape: tuple[int, ...],
    wanted: tuple[int, int],
    documents: int,
    left_documents: int,
    left_tokens: int,
    left_characters: int,
) -> str:
    plural = "" if documents == 1 else "s"
    text = f"{name}: {shape[0]} x {shape[1]} = {shape[0] * shape[1]:,} tokens of {documents:,} document{plural}"
    if shape[1] < wanted[1]:
        text += f"; fewer than one sequence of {wanted[1]}, so the sequence is shorter"
    elif shape[0] < wanted[0]:
        text += f"; {wanted[0]} sequences wanted, the source is too small"
    left = []
    if left_tokens:
        left.append(f"{left_tokens:,} tokens (past the last sequence)")
    if left_documents:
        left.append(f"{left_documents:,} documents")
    if left_characters:
        left.append(f"{left_characters:,} characters (not needed)")
    return text + (f"; left over: {', '.join(left)}" if left else "")


def _as_given(tokens: np.ndarray, vocab_size: int | None) -> CalibrationSet:
    if tokens.size == 0:
        raise CalibrationError(f"the calibration set is empty: tokens of shape {tokens.shape}")
    check_tokens(tokens, vocab_size, "the token array")
    s, t = tokens.shape
    return CalibrationSet(tokens.astype(np.int32), f"given tokens: {s} x {t} = {s * t:,} tokens, as given", s)
