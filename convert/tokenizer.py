"""Tokenizers: from the files of a checkpoint directory, or rebuilt from GGUF metadata."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import normalizers

from awq_jax.convert import bpe, tokenizer_files, tokenizer_models
from awq_jax.convert.text import DEFAULT, TEMPLATE_NAME, ChatTemplate, Tokenizer, TokenizerLike, surround
from awq_jax.errors import CheckpointError, FormatError, MissingPackageError, needed

log = logging.getLogger(__name__)

GgufMetadata = Mapping[str, Any]
"""Keys and values of the header of a GGUF file; see `awq_jax.convert.formats.gguf.file.GgufFile`."""

# Any of these makes a directory one that has a tokenizer.
FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "tokenizer_config.json")

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

KEY = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"


def from_directory(directory: Path) -> TokenizerLike | None:
    """The tokenizer of a checkpoint directory; no code from it is ever run.

    Returns:
      None if the directory has no tokenizer files, or none with a vocabulary; a tokenizer of transformers if they make
      none of the ``tokenizers`` package.

    Raises:
      CheckpointError: if its files cannot be made into a tokenizer.
    """
    if not any((directory / name).is_file() for name in FILES):
        return None
    try:
        if (directory / "tokenizer.json").is_file():
            return tokenizer_files.from_json(directory)
        if (made := tokenizer_models.from_models(directory)) is not None:
            return made
        if not (directory / "vocab.json").is_file() and (ranks := tokenizer_models.ranks(directory)) is not None:
            log.warning(
                "%s does not say how text is split, only code does: no tokenizer; put tokenizer.json there", ranks
            )
            return None
        log.info("%s has no tokenizer.json; transformers makes the tokenizer of the other files", directory)
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
        transformers = needed("transformers", f"the tokenizer of {directory}, which has no tokenizer.json,")  # seconds
        theirs = transformers.AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
        if not theirs("a", add_special_tokens=False)["input_ids"]:  # made of settings alone
            log.warning("%s has settings of a tokenizer and no vocabulary: put tokenizer.json there", directory)
            return None
        return tokenizer_files.adopt(theirs)
    except MissingPackageError:
        raise
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
        kinds = metadata.get(f"{KEY}token_type")
        bpe.mark(backend, tokens, [] if kinds is None else [int(k) for k in kinds])
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
    ids = {t: i for i, t in enumerate(tokens)}
    pairs = [_merge(m, path) for m in merges if m != ""]
    if pre in SPLITS:
        tokenizer = bpe.byte_level(ids, pairs, SPLITS[pre], ignore_merges=pre in BOS_BY_DEFAULT)
    else:
        tokenizer = bpe.byte_level(ids, pairs, digits=pre in DIGITS)
    if pre in NORMALIZED:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _spm(metadata: GgufMetadata, tokens: list[str]) -> tokenizers.Tokenizer:
    scores = metadata.get(f"{KEY}scores")
    ranks = [0.0] * len(tokens) if scores is None else [float(s) for s in scores]
    unknown = tokens[metadata.get(f"{KEY}unknown_token_id", 0)]
    return bpe.sentencepiece(tokens, ranks, unknown, _flag(metadata, "add_space_prefix", True))


def _merge(text: object, path: Path | str) -> tuple[str, str]:
    """A merge is two tokens with a space between; byte-level tokens contain none."""
    left, _, right = text.partition(" ") if isinstance(text, str) else ("", "", "")
    if not left or not right:
        raise CheckpointError(f"{path}: {KEY}merges holds {text!r}, not two tokens; download it again")
    return left, right


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
