"""Calibration data: tokens ``[S, T]`` from any source of text or tokens, with an account of what was used."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from awq_jax.convert.text import TextTokenizer, ids_of
from awq_jax.data import sources
from awq_jax.errors import CalibrationError

BATCH_TOKENS = {"cpu": 512}  # by backend; what bounds the memory of activations
BATCH_TOKENS_ELSEWHERE = 8192
_Excerpt = tuple[int, str]  # the number of a document, and some of its text
_Encoded = tuple[int, np.ndarray, int]  # of an excerpt: the document's number, tokens [t], characters they stand for


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Token sequences of one length, and where they came from.

    Attributes:
      tokens: int32 ``[S, T]``.
      description: one line for the user: source, sizes, and what was left over.
      documents: documents of which at least one token was used.
      left_documents: documents read of which nothing was used.
      left_tokens: tokens encoded but not used (less than one sequence, or past the last one).
      left_characters: characters read but not encoded, because there were tokens enough.
    """

    tokens: np.ndarray
    description: str
    documents: int = 0
    left_documents: int = 0
    left_tokens: int = 0
    left_characters: int = 0

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


CalibrationSource = str | Path | CalibrationSet | Iterable[str] | npt.ArrayLike  # see `load`


def load(
    source: CalibrationSource,
    tokenizer: TextTokenizer | None = None,
    *,
    samples: int = 128,
    seq_len: int = 512,
    vocab_size: int | None = None,
    seed: int = 0,
) -> CalibrationSet:
    """Calibration tokens from ``source``.

    Long texts are cut, short ones packed one after another with the tokenizer's end token between
    them (if it has one); sequences may start in the middle of a text. Local texts are shuffled by
    ``seed`` in excerpts of about two sequences, so that few samples still see the whole source.
    If there are fewer tokens than one sequence, that one sequence is shorter; if there are fewer
    than ``samples`` sequences, all are used. ``description`` says so.

    Args:
      source: ``"pileval"``, ``"wikitext"``, ``"c4"`` or ``"hf:OWNER/NAME[:CONFIG[:SPLIT]]"`` (read
        with `datasets`, streamed); ``"default"`` (the text of Python's help topics, no network); a
        path to ``.txt``, ``.md``, ``.jsonl``, ``.parquet`` or ``.npy``; a list of strings; a list of
        token lists (packed like texts); an integer array ``[S, T]``, used whole and as it stands;
        or a `CalibrationSet`, returned after the vocabulary check.
      tokenizer: a model's, or one of transformers; required for text.
      samples: sequences wanted.
      seq_len: tokens per sequence.
      vocab_size: tokens must lie in ``[0, vocab_size)``; None checks only the lower bound.
      seed: of the shuffle.

    Raises:
      CalibrationError: if the source is unknown, unreachable, unreadable or empty, if text comes
        without a tokenizer, or if a token lies outside the vocabulary.
    """
    if samples < 1 or seq_len < 1:
        raise CalibrationError(f"samples and seq_len must be at least 1; got {samples} and {seq_len}")
    if seed < 0:
        raise CalibrationError(f"seed must be 0 or more; got {seed}")
    if isinstance(source, CalibrationSet):
        check_tokens(source.tokens, vocab_size, "the calibration set")
        return source
    if isinstance(source, str):
        check_source(source)
    eos = getattr(tokenizer, "eos_token_id", None)
    pack = functools.partial(_pack, eos=eos, samples=samples, seq_len=seq_len, vocab_size=vocab_size)
    documents: object = source
    name = "given texts"
    if isinstance(source, Path) or (isinstance(source, str) and _is_file(source)):
        path, name = Path(source), str(source)
        documents = _read_npy(path) if path.suffix == ".npy" else sources.read_file(path)
    elif isinstance(source, str) and source == "default":
        documents, name = sources.default_documents(), "Python help topics"
    elif isinstance(source, str):
        excerpts = ((i, t) for i, t in enumerate(sources.stream(source, seed)) if t.strip())
        return pack(_encode(excerpts, _needed(tokenizer, source)), source)
    if hasattr(documents, "ndim"):
        documents = np.asarray(documents)
        if documents.ndim == 2:
            return _as_given(documents, vocab_size)
        documents = [documents]
    documents = list(documents) if isinstance(documents, Iterable) else []
    if not documents:
        raise CalibrationError(f"the calibration set is empty ({type(source).__name__}); pass texts or tokens")
    if not all(isinstance(d, str) for d in documents):
        return pack([(i, _as_tokens(d, i), 0) for i, d in enumerate(documents)], "given tokens", len(documents))
    tokenizer = _needed(tokenizer, name)
    shuffled = _excerpts(documents, name, 8 * seq_len, seed)
    total, characters = len({i for i, _ in shuffled}), sum(len(t) for _, t in shuffled)
    return pack(_encode(iter(shuffled), tokenizer), name, total, characters)


def check_source(source: str) -> None:
    """Refuse a name that `load` does not know or a file that is not there; reads nothing.

    Raises:
      CalibrationError: naming the known sources.
    """
    if _is_file(source):
        if not Path(source).exists():
            raise CalibrationError(f"{source} does not exist")
    elif source != "default" and source not in sources.DATASETS and not source.startswith("hf:"):
        raise CalibrationError(f"unknown calibration source {source!r}; known: {sources.known()}")


def encode(text: str, tokenizer: TextTokenizer | None) -> np.ndarray:
    """``text`` as int32 tokens ``[T]``, with the start token the tokenizer adds by itself.

    Raises:
      CalibrationError: if there is no tokenizer.
    """
    return np.asarray(ids_of(_needed(tokenizer, "text"), [text])[0], np.int32)


def _is_file(name: str) -> bool:
    if len(name) > 1000 or "\n" in name:
        raise CalibrationError(f"a text of {len(name)} characters stands where a source's name belongs: pass [text]")
    return Path(name).suffix in sources.SUFFIXES or (name not in sources.DATASETS and Path(name).is_file())


def _needed(tokenizer: TextTokenizer | None, source: str) -> TextTokenizer:
    if tokenizer is None:
        raise CalibrationError(
            f"{source!r} needs a tokenizer and the model has none: put tokenizer.json beside it or pass tokens"
        )
    return tokenizer


def _excerpts(documents: Sequence[str], name: str, size: int, seed: int) -> list[_Excerpt]:
    """Excerpts of at most ``size`` characters, shuffled."""
    excerpts = [(i, piece) for i, text in enumerate(documents) for piece in _cut(text, size) if piece.strip()]
    if not excerpts:
        raise CalibrationError(f"{name} has no text")
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


def _encode(excerpts: Iterator[_Excerpt], tokenizer: TextTokenizer) -> Iterator[_Encoded]:
    """The tokens of excerpts, 16 texts at a time."""
    while batch := list(itertools.islice(excerpts, 16)):
        for (i, text), ids in zip(batch, ids_of(tokenizer, [t for _, t in batch]), strict=True):
            yield i, np.asarray(ids, np.int64), len(text)


def _pack(
    encoded: Iterable[_Encoded],
    name: str,
    total: int | None = None,
    characters: int = 0,
    *,
    eos: int | None,
    samples: int,
    seq_len: int,
    vocab_size: int | None,
) -> CalibrationSet:
    """Concatenate excerpts with end tokens between, and cut into sequences.

    ``total``, ``characters``: documents and characters of all excerpts, if that is known beforehand.
    """
    want, have = samples * seq_len, 0
    chunks: list[np.ndarray] = []
    seen: set[int] = set()
    for i, tokens, read in encoded:
        if have >= want:
            break
        if chunks and eos is not None and chunks[-1][-1] != eos:
            chunks.append(np.asarray([eos], np.int32))
            have += 1
        if tokens.size:
            chunks.append(tokens)
            have += tokens.size
            seen.add(i)
        characters -= read
    if not have:
        raise CalibrationError(f"{name} is empty: it gave no tokens")
    flat = np.concatenate(chunks)
    check_tokens(flat, vocab_size, name)
    length = min(seq_len, have)
    count = min(samples, have // length)
    used = flat[: count * length].astype(np.int32).reshape(count, length)
    left_documents = 0 if total is None else total - len(seen)
    left = have - used.size
    text = _describe(name, used.shape, (samples, seq_len), len(seen), left_documents, left, max(characters, 0))
    return CalibrationSet(used, text, len(seen), left_documents, left, max(characters, 0))


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


def _as_tokens(document: object, index: int) -> np.ndarray:
    try:
        tokens = np.asarray(document)
    except ValueError:
        tokens = np.asarray(None)
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        kind = f"{tokens.dtype} array of shape {tokens.shape}" if tokens.ndim else type(document).__name__
        raise CalibrationError(f"document {index} is neither a text nor a list of tokens but {kind}")
    return tokens.astype(np.int64)


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise CalibrationError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError) as e:
        raise CalibrationError(f"{path} is not a readable .npy file: {e}") from None


def check_tokens(tokens: np.ndarray, vocab_size: int | None, name: str) -> None:
    if not np.issubdtype(tokens.dtype, np.integer):
        raise CalibrationError(f"{name} has dtype {tokens.dtype}; tokens are integers")
    bad = tokens < 0 if vocab_size is None else (tokens < 0) | (tokens >= vocab_size)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        limit = "tokens are at least 0" if vocab_size is None else f"the model has tokens 0 ... {vocab_size - 1}"
        raise CalibrationError(
            f"{name} has token {int(tokens[where])} at position {where}, {int(bad.sum())} outside the vocabulary in "
            f"all; {limit}: use the tokenizer that belongs to the model"
        )
