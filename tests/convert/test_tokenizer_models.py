"""``tokenizer.model`` and ``tekken.json`` alone, against ``tokenizer.json`` of the same words and merges by hand."""

from __future__ import annotations

import base64
import itertools
import json
import logging
import struct
from pathlib import Path
from typing import Any

import pytest
from bpe_tokenizers import CORPUS, FIXTURE, LLAMA3, TEXTS, K, byte_level, spm_metadata
from tokenizers import Regex, Tokenizer, pre_tokenizers

from awq_jax.convert import tokenizer
from awq_jax.convert.formats.gguf import tokenizer as gguf_tokenizer
from awq_jax.errors import CheckpointError

PROBES = [*TEXTS, "Once upon a time, there was a little girl.", "<s>x</s> y", CORPUS[-2][:3000]]


def varint(n: int) -> bytes:
    n &= (1 << 64) - 1
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number: int, value: int | float | bytes) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def spm_model(trainer: dict[int, Any] | None = None, normalizer: dict[int, Any] | None = None) -> bytes:
    """The fixture's vocabulary as SentencePiece writes it (sentencepiece_model.proto), as Llama 2's is made."""
    meta = spm_metadata()
    pieces = zip(meta[K + "tokens"], meta[K + "scores"], meta[K + "token_type"], strict=True)
    out = b"".join(
        field(1, field(1, t.encode()) + field(2, float(s)) + (field(3, int(k)) if k != 1 else b""))
        for t, s, k in pieces
    )
    made = {3: 2, 35: 1, 43: -1} | (trainer or {})
    out += field(2, b"".join(field(n, v) for n, v in made.items()))
    return out + field(3, b"".join(field(n, v) for n, v in ({1: b"identity", 4: 0} | (normalizer or {})).items()))


def directory(path: Path, settings: dict[str, Any], **files: bytes) -> Path:
    path.mkdir()
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, data in files.items():
        (path / name.replace("_", ".")).write_bytes(data)
    return path


@pytest.mark.parametrize("cls", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None])
def test_sentencepiece(tmp_path: Path, cls: str | None) -> None:
    settings = {"tokenizer_class": cls, "bos_token": None}  # what is null here is what the model says
    got: Any = tokenizer.from_directory(directory(tmp_path / "m", settings, tokenizer_model=spm_model()))
    want = Tokenizer.from_file(str(FIXTURE / "tokenizer.json"))
    for text in PROBES:
        assert got.encode(text) == want.encode(text).ids
        assert got.decode(got.encode(text)) == want.decode(want.encode(text).ids, skip_special_tokens=False)
    assert (got.bos_token, got.eos_token, got.unk_token, got.pad_token) == ("<s>", "</s>", "<unk>", None)
    meta = gguf_tokenizer.metadata(got, {"vocab_size": len(got)})
    assert (meta[K + "model"], meta[K + "add_bos_token"]) == ("llama", True)


def test_what_the_settings_add_to_sentencepiece(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True}
    added = {"pad_token": "<pad>", "additional_special_tokens": ["<|tool|>"], "chat_template": "x"}
    model = spm_model(normalizer={3: 0})
    got: Any = tokenizer.from_directory(directory(tmp_path / "m", settings | added, tokenizer_model=model))
    size = len(spm_metadata()[K + "tokens"])
    assert (got.pad_token_id, got.convert_tokens_to_ids("<|tool|>")) == (size, size + 1)
    assert got.encode("a<|tool|>") == [*got.encode("a", add_special_tokens=False), size + 1, got.eos_token_id]
    assert got.decode(got.encode("time", add_special_tokens=False)) == "time"
    assert got.tokenize("time")[0] != "▁time"  # no space is put before the text
    assert got.chat_template == "x"


@pytest.mark.parametrize(
    "model",
    [
        spm_model(trainer={3: 1}),  # unigram
        spm_model(trainer={35: 0}),  # no bytes
        spm_model(normalizer={4: 1}),  # drops white space
        spm_model(normalizer={2: b"charsmap"}),
        b"IQ== 0\nIg== 1\n",  # tiktoken's
    ],
)
def test_other_models_are_left_to_transformers(tmp_path: Path, model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def theirs(path: str, **options: bool) -> None:
        asked.append(path)
        assert options["trust_remote_code"] is False
        raise ValueError("not here")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", theirs)
    src = directory(tmp_path / "m", {"tokenizer_class": "LlamaTokenizer"}, tokenizer_model=model)
    with pytest.raises(CheckpointError, match="cannot be read: ValueError: not here"):
        tokenizer.from_directory(src)
    assert asked == [str(src)]


@pytest.mark.parametrize("cut", [-3, 40])
def test_a_damaged_model_is_named(tmp_path: Path, cut: int) -> None:
    src = directory(tmp_path / "m", {}, tokenizer_model=spm_model()[:cut])
    with pytest.raises(CheckpointError, match=r"tokenizer files of .* cannot be read"):
        tokenizer.from_directory(src)


def by_rank(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's algorithm: of all neighbours the two whose join has the lowest rank, until none has one."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        joins = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not joins:
            return [ranks[p] for p in parts]
        _, i = min(joins)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_tekken(tmp_path: Path) -> None:
    raw = byte_level("llama-bpe")
    vocabulary = sorted(raw.get_vocab().items(), key=lambda item: item[1])[3:]  # past the special tokens
    letters = pre_tokenizers.ByteLevel.alphabet()
    order = sorted(range(256), key=lambda b: (not (33 <= b < 127 or 161 <= b < 173 or b > 173), b))
    byte_of = dict(zip(sorted(letters), order, strict=True))
    tokens = [bytes(byte_of[c] for c in t) for t, _ in vocabulary]
    special = [
        {"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(["<unk>", "<s>", "</s>", "[INST]"])
    ]
    data = {
        "config": {"pattern": LLAMA3, "default_vocab_size": len(tokens) + 8 - 20, "default_num_special_tokens": 8},
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(tokens)],
        "special_tokens": special,
    }
    src = tmp_path / "m"
    src.mkdir()
    (src / "tekken.json").write_text(json.dumps(data))
    (src / "chat_template.jinja").write_text("{{ bos_token }}[INST]{{ messages[0].content }}")
    got: Any = tokenizer.from_directory(src)
    ranks = {t: i for i, t in enumerate(tokens[:-20])}
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    for text in TEXTS:
        pieces = [p for p, _ in split.pre_tokenize_str(text)]
        assert got.encode(text) == [1, *(8 + i for p in pieces for i in by_rank(p.encode(), ranks))]
        assert got.decode(got.encode(text), skip_special_tokens=True) == text
    assert (got.bos_token, got.eos_token_id, len(got)) == ("<s>", 2, len(tokens) + 8 - 20)
    ids = got.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=False)
    assert ids[:2] == [1, 3]


@pytest.mark.parametrize("name", ["tiktoken.model", "qwen.tiktoken"])
def test_tiktoken_says_not_how_text_is_split(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    src = directory(tmp_path / "m", {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["a.Tok", None]}})
    (src / name).write_bytes(b"IQ== 0\n")
    with caplog.at_level(logging.WARNING):
        assert tokenizer.from_directory(src) is None
    assert f"{name} does not say how text is split" in caplog.text


def test_settings_without_a_vocabulary_make_no_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert tokenizer.from_directory(tmp_path) is None
    assert "no vocabulary: put tokenizer.json there" in caplog.text
