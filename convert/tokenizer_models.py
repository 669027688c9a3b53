"""Tokenizers that come as SentencePiece's ``tokenizer.model`` or Mistral's ``tekken.json``, without ``tokenizer.json``.

Read here is what the files themselves say all of: SentencePiece BPE that leaves text as it is (Llama, Gemma), and
tekken. Neither sentencepiece nor transformers is needed. Other SentencePiece models are transformers' to read.
"""

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from awq_jax.convert import bpe, tokenizer_files
from awq_jax.convert.text import Tokenizer, surround

# Classes of tokenizers that do what their tokenizer.model says.
OURS = ("Llama", "CodeLlama", "Gemma", "PreTrained", "TokenizersBackend", "None")
BPE_MODEL = 2  # of SentencePiece's TrainerSpec.model_type


def from_models(directory: Path) -> Tokenizer | None:
    """The tokenizer of ``tekken.json`` or ``tokenizer.model``; None if there is none, or none that is read here."""
    if (path := directory / "tekken.json").is_file():
        return _tekken(path, directory)
    path, settings = directory / "tokenizer.model", tokenizer_files.settings_of(directory)
    kind = tokenizer_files.kind_of(settings)
    if not path.is_file() or kind not in OURS or "auto_map" in settings:
        return None
    return _sentencepiece(path.read_bytes(), directory, settings)


def ranks(directory: Path) -> Path | None:
    """A file of tiktoken, which has tokens but not the pattern that text is split by."""
    return next((p for p in (directory / "tiktoken.model", *sorted(directory.glob("*.tiktoken"))) if p.is_file()), None)


def _tekken(path: Path, directory: Path) -> Tokenizer | None:
    """Ids are those of the special tokens, then the ranks. None where it does not list its special tokens."""
    data = json.loads(path.read_bytes())
    config, special = data["config"], data.get("special_tokens")
    count = config["default_num_special_tokens"]
    if special is None:
        return None
    names = [f"<SPECIAL_{i}>" for i in range(count)]
    for token in special:
        names[token["rank"]] = token["token_str"]
    letters = _letters()
    vocabulary = sorted(data["vocab"], key=lambda t: t["rank"])[: config["default_vocab_size"] - count]
    tokens = ["".join(letters[b] for b in base64.b64decode(t["token_bytes"])) for t in vocabulary]
    merges = bpe.merges_from_scores(tokens, [-float(i) for i in range(len(tokens))])
    ids = {t: i for i, t in enumerate([*names, *tokens])}
    backend = bpe.byte_level(ids, merges, config["pattern"], ignore_merges=True)
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings = {**{k: v for k, v in named.items() if v in names}, **tokenizer_files.settings_of(directory)}
    tokenizer_files.mark_special(backend, settings)
    surround(backend, settings.get("bos_token"), None)
    return tokenizer_files.finished(backend, directory, settings)


def _letters() -> list[str]:
    """The letter of each byte in byte-level vocabularies: itself where it is visible, else one past 255."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in visible]
    return [chr(b) if b in visible else chr(256 + rest.index(b)) for b in range(256)]


def _sentencepiece(data: bytes, directory: Path, settings: tokenizer_files.Settings) -> Tokenizer | None:
    """Fields by number as in sentencepiece_model.proto; None if it is no BPE with bytes, or changes the text first."""
    if not data.startswith(b"\n"):  # the first piece; tiktoken's files of the same name are text
        return None
    model = list(_fields(data))
    trainer = dict(_fields(next((v for k, v in model if k == 2), b"")))
    normalizer = dict(_fields(next((v for k, v in model if k == 3), b"")))
    changes = normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1)  # charsmap, white space, its mark
    if trainer.get(3, 1) != BPE_MODEL or not trainer.get(35) or changes or trainer.get(24):
        return None
    pieces = [dict(_fields(v)) for k, v in model if k == 1]
    tokens = [p[1].decode("utf-8") for p in pieces]
    scores = [p.get(2, 0.0) for p in pieces]
    found = {
        "unk": trainer.get(40, 0),
        "bos": trainer.get(41, 1),
        "eos": trainer.get(42, 2),
        "pad": trainer.get(43, -1),
    }
    named = {f"{name}_token": tokens[i] for name, i in found.items() if 0 <= i < len(tokens)}
    backend = bpe.sentencepiece(tokens, scores, named["unk_token"], bool(normalizer.get(3, 1)))
    bpe.mark(backend, tokens, [p.get(3, 1) for p in pieces])
    kind = tokenizer_files.kind_of(settings)
    begins = tokenizer_files.ADDS_BOS.get(kind, True)
    settings = {**named, "tokenizer_class": f"{kind}Tokenizer", **{k: v for k, v in settings.items() if v is not None}}
    tokenizer_files.add_listed(backend, directory, settings)
    begin = settings.get("add_bos_token", begins)
    surround(
        backend,
        named.get("bos_token") if begin else None,
        named.get("eos_token") if settings.get("add_eos_token") else None,
    )
    return tokenizer_files.finished(backend, directory, settings)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """``(number, value)`` of a protocol buffer: ints, floats, and bytes of what is nested."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value - (1 << 64) if value >> 63 else value
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            yield key >> 3, struct.unpack_from("<d" if kind == 1 else "<f", data, at)[0]
            at += size
        elif kind == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("tokenizer.model ends within a field")
            yield key >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError(f"tokenizer.model has a field of kind {kind}, which SentencePiece does not write")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
