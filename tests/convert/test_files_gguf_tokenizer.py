"""Tokenizers into GGUF metadata: what our reader makes of it gives the same ids; other kinds are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bpe_tokenizers
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from awq_jax.convert import tokenizer
from awq_jax.convert.formats.gguf import tokenizer as gguf_tokenizer
from awq_jax.errors import CheckpointError, FormatError

K = "tokenizer.ggml."
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    *bpe_tokenizers.TEXTS,
    "McDonald's HTTPServer iPhone/7 e\u0301t\u00e9 ŽLUŤOUČKÝ",
    bpe_tokenizers.CORPUS[-2][:3000],
]


def wrap(t: Tokenizer, **more: Any) -> PreTrainedTokenizerFast:
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=t, chat_template=bpe_tokenizers.CHAT, **(special | more))


def byte_level(pre: str) -> Tokenizer:
    """As the published models of that kind are built."""
    base = {"gpt-2": "default", "smaug-bpe": "llama-bpe", "tekken": "llama-bpe"}.get(pre, pre)
    t = bpe_tokenizers.byte_level(base)
    if pre == "smaug-bpe":
        t.model.ignore_merges = False
    if pre == "tekken":
        split = pre_tokenizers.Split(Regex(TEKKEN), "isolated")
        t.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return t


def size(t: Any) -> dict[str, Any]:
    return {"vocab_size": len(t) + 5}


def back(t: Any, config: dict[str, Any] | None = None) -> Any:
    """Through the metadata and our reader; checked to be of the types the file can hold."""
    meta = gguf_tokenizer.metadata(t, config or size(t))
    for value in meta.values():
        items = value if isinstance(value, list) else [value]
        assert items
        assert len({type(v) for v in items}) == 1
        assert isinstance(items[0], str | int | float)
    return meta, tokenizer.from_gguf(meta)


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "gpt-2"])
def test_byte_level_kinds(pre: str) -> None:
    t = wrap(byte_level(pre), pad_token="<|endoftext|>")
    meta, got = back(t)
    assert (meta[K + "model"], meta[K + "pre"]) == ("gpt2", pre)
    assert (meta[K + "add_bos_token"], meta[K + "add_eos_token"]) == (False, False)
    assert len(meta[K + "tokens"]) == len(meta[K + "token_type"]) == len(t) + 5
    for text in [*TEXTS, "<|im_start|>user\nhi there<|im_end|>"]:
        assert got(text).input_ids == t(text).input_ids
    assert (got.bos_token, got.eos_token, got.pad_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert got.chat_template == bpe_tokenizers.CHAT


def test_what_we_read_is_written_alike() -> None:
    """Metadata as llama.cpp's converter writes them, read and written again."""
    for pre in ("smollm", "llama-bpe", "qwen2"):
        meta = bpe_tokenizers.metadata_of(byte_level(pre), pre, add_bos_token=True, add_eos_token=False)
        again = gguf_tokenizer.metadata(tokenizer.from_gguf(meta), {"vocab_size": len(meta[K + "tokens"])})
        assert set(again) == {k for k in meta if k.startswith("tokenizer.")}
        for key, value in again.items():
            assert value == (meta[key].tolist() if isinstance(meta[key], np.ndarray) else meta[key]), key


def test_tokens_and_their_types() -> None:
    raw = byte_level("smollm")
    raw.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    raw.add_special_tokens([AddedToken("<|tool|>", special=True)])
    t = wrap(raw)
    meta, got = back(t)
    tokens, kinds = meta[K + "tokens"], meta[K + "token_type"]
    assert [kinds[tokens.index(x)] for x in ("<|im_start|>", "<|tool|>", "<think>", "a")] == [3, 3, 4, 1]
    assert tokens[-5:] == [f"[PAD{i}]" for i in range(len(t), len(t) + 5)]
    assert kinds[-5:] == [5] * 5
    text = "a<think> b<|tool|>"
    assert got(text).input_ids == t(text).input_ids
    assert got.decode(got(text).input_ids, skip_special_tokens=True) == "a<think> b"


def test_ends_of_text() -> None:
    raw = byte_level("llama-bpe")
    raw.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A $B <|im_end|>",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )
    t = wrap(raw, eos_token="<|im_end|>")
    meta, got = back(t, size(t) | {"eos_token_id": [2, 0]})
    assert (meta[K + "add_bos_token"], meta[K + "add_eos_token"]) == (True, True)
    assert K + "eot_token_id" not in meta  # llama.cpp knows <|im_end|> by its text
    assert got("hi").input_ids == t("hi").input_ids
    other = wrap(raw, bos_token="<|im_start|>", eos_token="<|endoftext|>")
    with pytest.raises(FormatError, match=r"puts tokens around a text that are not its bos and eos: \[1, .*, 2\]"):
        gguf_tokenizer.metadata(other, size(other))
    plain = wrap(byte_level("smollm"), eos_token="<|endoftext|>")
    assert gguf_tokenizer.metadata(plain, size(plain) | {"eos_token_id": [0, 2]})[K + "eot_token_id"] == 2


@pytest.fixture(scope="module")
def spm() -> Any:
    return tokenizer.from_directory(bpe_tokenizers.FIXTURE)


def test_sentencepiece(spm: Any) -> None:
    meta, got = back(spm)
    assert (meta[K + "model"], meta[K + "pre"], meta[K + "add_space_prefix"]) == ("llama", "default", True)
    assert (meta[K + "add_bos_token"], meta[K + "add_eos_token"]) == (True, False)
    assert meta[K + "token_type"][:5] == [2, 3, 3, 6, 6]
    for text in [*TEXTS, "Once upon a time", "<s>x</s>"]:
        assert got(text).input_ids == spm(text).input_ids
    # The scores rank the pieces as SentencePiece's own do.
    own = bpe_tokenizers.spm_metadata()[K + "scores"]
    normal = [i for i, k in enumerate(meta[K + "token_type"][: len(own)]) if k == 1 and meta[K + "scores"][i] > -165]
    ranked = sorted(normal, key=lambda i: -meta[K + "scores"][i])
    assert ranked == sorted(normal, key=lambda i: -own[i])


def edited(spm: Any, **changes: Any) -> PreTrainedTokenizerFast:
    data = json.loads(spm.backend_tokenizer.to_str())
    for key, value in changes.items():
        if key == "model":
            data["model"] |= value
        else:
            data[key] = value
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_sentencepiece_as_a_pre_tokenizer(spm: Any, scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    t = edited(spm, normalizer=None, pre_tokenizer=step)
    meta, got = back(t)
    assert meta[K + "add_space_prefix"] is (scheme != "never")
    assert ("before text that begins with one" in caplog.text) is (scheme != "never")
    for text in TEXTS:
        known = scheme != "never" and text.startswith(" ")
        assert (got(text).input_ids == t(text).input_ids) is not known


def test_merges_must_follow_from_the_pieces(spm: Any) -> None:
    merges = json.loads(spm.backend_tokenizer.to_str())["model"]["merges"]
    with pytest.raises(FormatError, match=r"merges do not follow from its vocabulary.*1 differ, e\.g\. '▁ \+ t'"):
        gguf_tokenizer.metadata(edited(spm, model={"merges": merges[1:]}), size(spm))


def of(model: Any, pre: Any = None, normal: Any = None) -> PreTrainedTokenizerFast:
    t = Tokenizer(model)
    if pre:
        t.pre_tokenizer = pre
    if normal:
        t.normalizer = normal
    t.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=t)


LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
REFUSALS: dict[str, tuple[Any, str]] = {
    "unigram": (of(models.Unigram([("a", 0.0)], None)), "the tokenizer is Unigram"),
    "wordpiece": (of(models.WordPiece({"a": 0, "[UNK]": 1})), "the tokenizer is WordPiece"),
    "dropout": (of(models.BPE({"a": 0}, [], dropout=0.5)), "BPE with dropout"),
    "split": (of(models.BPE({"a": 0}, []), pre_tokenizers.Whitespace()), "splits text by .*Whitespace"),
    "pattern": (
        of(models.BPE({"a": 0}, []), pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("x"), "isolated"), LEVEL])),
        "splits text by .*Split",
    ),
    "prefix": (of(models.BPE({"a": 0}, []), pre_tokenizers.ByteLevel(add_prefix_space=True)), "splits text by"),
    "words": (of(models.BPE({"a": 0}, [], ignore_merges=True), LEVEL), "splits text by"),
    "normal": (of(models.BPE({"a": 0}, []), LEVEL, normalizers.Lowercase()), "normalises text by Lowercase"),
    "spm normal": (
        of(models.BPE({"a": 0}, [], byte_fallback=True), normal=normalizers.NFKC()),
        "prepares text by .*NFKC",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_other_kinds_are_refused(case: str) -> None:
    t, message = REFUSALS[case]
    with pytest.raises(FormatError, match=message + ".*llama.cpp has no such tokenizer"):
        gguf_tokenizer.metadata(t, {"vocab_size": 8})


def test_more_tokens_than_rows(spm: Any) -> None:
    with pytest.raises(CheckpointError, match=r"ids up to 511, config\.json says that vocab_size is 500"):
        gguf_tokenizer.metadata(spm, {"vocab_size": 500})


def test_no_tokenizer(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    assert gguf_tokenizer.metadata(None, {}) == {K + "model": "no_vocab"}
    assert "no tokenizer" in caplog.text


def test_no_merges() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = of(models.BPE({c: i for i, c in enumerate(alphabet)}, []), LEVEL)
    _, got = back(t)
    assert all(got(x).input_ids == t(x).input_ids for x in TEXTS)
