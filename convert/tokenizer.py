"""Tokenizers: from the files of a checkpoint directory, or rebuilt from GGUF metadata."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from awq_jax.convert import tokenizer_files
from awq_jax.convert.text import DEFAULT, TEMPLATE_NAME, ChatTemplate, Tokenizer, TokenizerLike, surround
from awq_jax.errors import CheckpointError, FormatError

log = logging.getLogger(__name__)

GgufMetadata = Mapping[str, Any]
"""Keys and values of the header of a GGUF file; see `awq_jax.convert.formats.gguf.file.GgufFile`."""

# Any of these makes a directory one that has a tokenizer.
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

# Splitting patterns by `tokenizer.ggml.pre`, as the models' own tokenizer.json have them.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + r"\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTION + r"\p{N}" + _REST
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"  # words that are cut where capitals begin
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = rf"{_CASED}*{_LOWER}+|{_CASED}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: Mapping[str, str] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _TEKKEN,
}
DIGITS = ("smollm", "starcoder", "refact", "command-r")  # every digit alone, then GPT-2's pattern
GPT2 = ("gpt-2", "gpt2", "default")
NORMALIZED = ("qwen2", "deepseek-r1-qwen")  # NFC first
BOS_BY_DEFAULT = ("llama3", "llama-v3", "llama-bpe", "tekken")  # and take a word that is a token as it is

CONTROL, USER_DEFINED = 3, 4  # token types: special; matched whole, yet ordinary text
KEY = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
SPACE = "\u2581"


def from_directory(directory: Path) -> TokenizerLike | None:
    """The tokenizer of a checkpoint directory; no code from it is ever run.

    Returns:
      None if the directory has no tokenizer files; a tokenizer of transformers if they make none of the ``tokenizers``
      package.

    Raises:
      CheckpointError: if its files cannot be made into a tokenizer.
    """
    if not any((directory / name).is_file() for name in FILES):
        return None
    try:
        if (directory / "tokenizer.json").is_file():
            return tokenizer_files.from_json(directory)
        log.info("%s has no tokenizer.json; transformers makes the tokenizer of the other files", directory)
        from transformers import AutoTokenizer  # takes seconds

        made = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        return tokenizer_files.adopt(made)
    except Exception as e:  # transformers and tokenizers raise whatever the damage leads to
        raise CheckpointError(
            f"the tokenizer files of {directory} cannot be read: {type(e).__name__}: {str(e)[:300]}; copy them again"
        ) from e


def from_gguf(metadata: GgufMetadata, path: Path | str = "GGUF file") -> Tokenizer | None:
    """The tokenizer described by the metadata of a GGUF file.

    Args:
      metadata: of the file.
      path: named in error messages.

    Returns:
      A tokenizer with special tokens and chat templates; None if there is no vocabulary.

    Raises:
      FormatError: an unknown tokenizer model or pre-tokenizer.
      CheckpointError: the metadata contradict each other.
    """
    model = metadata.get(f"{KEY}model")
    if model is None or model == "no_vocab":
        return None
    if model not in ("gpt2", "llama"):
        raise FormatError(
            f"{path} has a tokenizer of kind {str(model)[:100]!r}; built are 'gpt2' (BPE) and 'llama' (SPM)"
        )
    tokens = metadata.get(f"{KEY}tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise CheckpointError(f"{path}: {KEY}tokens is missing or not a list of strings; download it again")
    try:
        backend = _bpe(metadata, tokens, path) if model == "gpt2" else _spm(metadata, tokens)
        _add_tokens(backend, metadata, tokens)
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        special = {f"{ours}_token": _token(metadata, theirs, tokens, path) for ours, theirs in names.items()}
        add_bos = _flag(metadata, "add_bos_token", model == "llama" or metadata.get(f"{KEY}pre") in BOS_BY_DEFAULT)
        surround(
            backend,
            special["bos_token"] if add_bos else None,
            special["eos_token"] if _flag(metadata, "add_eos_token", False) else None,
        )
        given = {k: v for k, v in special.items() if v is not None}
        tokenizer_files.mark_special(backend, given)
        length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
        return Tokenizer(backend, given, _chat_template(metadata), None if length is None else int(length))
    except (FormatError, CheckpointError):
        raise
    except Exception as e:  # the tokenizers package raises plain Exception
        raise CheckpointError(
            f"{path}: its metadata make no tokenizer: {type(e).__name__}: {str(e)[:300]}; download it again"
        ) from e


def _bpe(metadata: GgufMetadata, tokens: list[str], path: Path | str) -> tokenizers.Tokenizer:
    """Byte-level BPE, as GPT-2 and after."""
    pre = metadata.get(f"{KEY}pre", "default")
    if pre not in SPLITS and pre not in DIGITS and pre not in GPT2:
        known = ", ".join((*SPLITS, *DIGITS, *GPT2))
        raise FormatError(f"{path} has pre-tokenizer {str(pre)[:100]!r}; known are {known}")
    merges = metadata.get(f"{KEY}merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{path}: {KEY}merges is missing; download it again")
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens)},
            merges=[_merge(m, path) for m in merges if m != ""],
            ignore_merges=pre in BOS_BY_DEFAULT,
        )
    )
    if pre in NORMALIZED:
        tokenizer.normalizer = normalizers.NFC()
    if pre in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre in DIGITS else []
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _spm(metadata: GgufMetadata, tokens: list[str]) -> tokenizers.Tokenizer:
    """SentencePiece BPE with byte fallback; the merges follow from the pieces' scores."""
    scores = metadata.get(f"{KEY}scores")
    ranks = [0.0] * len(tokens) if scores is None else [float(s) for s in scores]
    unknown = metadata.get(f"{KEY}unknown_token_id", 0)
    prefix = _flag(metadata, "add_space_prefix", True)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens)},
            merges=merges_from_scores(tokens, ranks),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), space] if prefix else [space])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def merges_from_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best-scored result first, then by id.

    Args:
      tokens: SentencePiece's pieces, by id.
      scores: of each.
    """
    ids = {t: i for i, t in enumerate(tokens)}
    merges = []
    for i, token in enumerate(tokens):
        cuts = [(token[:c], token[c:]) for c in range(1, len(token))]
        pairs = [(ids[a], ids[b], a, b) for a, b in cuts if a in ids and b in ids]
        merges += [(-scores[i], i, *pair) for pair in sorted(pairs)]
    return [(a, b) for *_, a, b in sorted(merges)]


def _merge(text: object, path: Path | str) -> tuple[str, str]:
    """A merge is two tokens with a space between; byte-level tokens contain none."""
    left, _, right = text.partition(" ") if isinstance(text, str) else ("", "", "")
    if not left or not right:
        raise CheckpointError(f"{path}: {KEY}merges holds {text!r}, not two tokens; download it again")
    return left, right


def _add_tokens(tokenizer: tokenizers.Tokenizer, metadata: GgufMetadata, tokens: list[str]) -> None:
    """Mark control tokens as special, and user-defined ones as never split."""
    types = metadata.get(f"{KEY}token_type")
    kinds = [] if types is None else [int(t) for t in types]
    named = list(zip(tokens, kinds, strict=False))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in named if k == CONTROL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in named if k == USER_DEFINED])


def _token(metadata: GgufMetadata, which: str, tokens: list[str], path: Path | str) -> str | None:
    i = metadata.get(f"{KEY}{which}_token_id")
    if i is None:
        return None
    if not isinstance(i, int) or not 0 <= i < len(tokens):
        raise CheckpointError(f"{path}: {KEY}{which}_token_id is {i!r}, the vocabulary has {len(tokens)} tokens")
    return tokens[i]


def _flag(metadata: GgufMetadata, key: str, default: bool) -> bool:
    return bool(metadata.get(f"{KEY}{key}", default))


def _chat_template(metadata: GgufMetadata) -> ChatTemplate | None:
    """The template, or several by name, as llama.cpp's converter stores them."""
    names = metadata.get("tokenizer.chat_templates")
    named = {n: metadata.get(f"{TEMPLATE}.{n}") for n in names or () if TEMPLATE_NAME.fullmatch(str(n))}
    found = {DEFAULT: metadata.get(TEMPLATE), **named}
    templates = {n: t for n, t in found.items() if isinstance(t, str)}
    return templates[DEFAULT] if set(templates) == {DEFAULT} else templates or None
