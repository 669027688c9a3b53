"""Tokenizers: from directories without running code, and rebuilt from GGUF metadata."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from bpe_tokenizers import CHAT, CORPUS, FIXTURE, TEXTS, K, byte_level, metadata_of, spm_metadata

from awq_jax.convert import tokenizer
from awq_jax.errors import CheckpointError, FormatError


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "default"])
def test_byte_level_bpe_is_rebuilt(pre: str) -> None:
    reference = byte_level(pre)
    got = tokenizer.from_gguf(metadata_of(reference, pre, add_bos_token=False))
    for text in [*TEXTS, CORPUS[-2], "<|im_start|>user\nhi there<|im_end|>"]:
        ids = got(text).input_ids
        assert ids == reference.encode(text).ids
        if pre != "qwen2":  # which normalises
            assert got.decode(ids) == text
    assert (got.bos_token, got.eos_token, got.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert got.model_max_length == 2048


def test_kinds_differ() -> None:
    """The test above would not notice if every kind split alike."""
    t = byte_level("default")
    ids = {
        pre: tokenizer.from_gguf(metadata_of(t, pre, add_bos_token=False)) for pre in ("smollm", "llama-bpe", "default")
    }
    assert len({tuple(got("  12345 IT'S\n\n").input_ids) for got in ids.values()}) == 3


def test_special_tokens_and_chat_template(tmp_path: Path) -> None:
    meta = metadata_of(byte_level("smollm"), "smollm")
    meta[K + "tokens"] = [*meta[K + "tokens"], "<think>"]
    meta[K + "token_type"] = np.append(meta[K + "token_type"], 4).astype(np.int32)
    got = tokenizer.from_gguf(meta)
    text = got.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    ids = got(text + "<think>", add_special_tokens=False).input_ids
    assert ids[0] == 1
    assert ids[-3:] == [2, got.convert_tokens_to_ids("Ċ"), len(got) - 1]
    assert got.decode(ids, skip_special_tokens=True) == "user\nhi\n<think>"
    got.save_pretrained(tmp_path)
    again = tokenizer.from_directory(tmp_path)
    assert [again(t).input_ids for t in TEXTS] == [got(t).input_ids for t in TEXTS]
    assert again.chat_template == CHAT


def test_begin_and_end_of_text() -> None:
    t = byte_level("llama-bpe")
    plain = t.encode("hi there").ids

    def ids(**flags: bool) -> list[int]:
        return tokenizer.from_gguf(metadata_of(t, "llama-bpe", **flags))("hi there").input_ids

    assert ids() == [1, *plain]  # Llama 3 begins with one unless told otherwise
    assert ids(add_bos_token=False) == plain
    assert ids(add_bos_token=False, add_eos_token=True) == [*plain, 2]
    assert ids(add_bos_token=True, add_eos_token=True) == [1, *plain, 2]
    assert tokenizer.from_gguf(metadata_of(byte_level("smollm"), "smollm"))("hi").input_ids[0] != 1


def test_sentencepiece_is_rebuilt_from_scores() -> None:
    reference = tokenizer.from_directory(FIXTURE)
    got = tokenizer.from_gguf(spm_metadata())
    for text in [*TEXTS, "Once upon a time, there was a little girl.", "<s>x</s>", CORPUS[-2][:5000]]:
        ids = got(text).input_ids
        assert ids == reference(text).input_ids
        assert "<s>" in text or got.decode(ids, skip_special_tokens=True) == text
    bare = tokenizer.from_gguf(spm_metadata() | {K + "add_space_prefix": False, K + "add_bos_token": False})
    assert bare.decode(bare("time").input_ids) == "time"
    assert bare(" time").input_ids == got("time").input_ids[1:]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pre": "martian"}, FormatError, "m.gguf has pre-tokenizer 'martian'; known are .*smollm"),
        ({"model": "t5"}, FormatError, "m.gguf has a tokenizer of kind 't5'"),
        ({"tokens": None}, CheckpointError, "tokenizer.ggml.tokens is missing"),
        ({"tokens": np.zeros(3)}, CheckpointError, "tokenizer.ggml.tokens is missing"),
        ({"merges": None}, CheckpointError, "tokenizer.ggml.merges is missing"),
        ({"merges": ["ab"]}, CheckpointError, "merges holds 'ab'"),
        ({"merges": ["zzzz qqqq"]}, CheckpointError, "m.gguf: its metadata make no tokenizer"),
        ({"eos_token_id": 10**6}, CheckpointError, "eos_token_id is 1000000, the vocabulary has"),
        ({"eos_token_id": "2"}, CheckpointError, "eos_token_id is '2'"),
    ],
)
def test_bad_metadata_is_named(change: dict, error: type[Exception], message: str) -> None:
    meta = metadata_of(byte_level("smollm"), "smollm") | {K + k: v for k, v in change.items()}
    with pytest.raises(error, match=message):
        tokenizer.from_gguf(meta, "m.gguf")


def test_absent_tokenizers(tmp_path: Path) -> None:
    assert tokenizer.from_gguf({}) is None
    assert tokenizer.from_gguf({K + "model": "no_vocab"}) is None
    assert tokenizer.from_directory(tmp_path) is None


def test_damaged_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer files of .* cannot be read"):
        tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("keep_json", [True, False])
def test_code_in_a_directory_is_never_run(tmp_path: Path, keep_json: bool) -> None:
    src = tmp_path / "model"
    shutil.copytree(FIXTURE, src)
    (src / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Tok: pass\n")
    config = json.loads((src / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}}
    (src / "tokenizer_config.json").write_text(json.dumps(config))
    if keep_json:
        reference = tokenizer.from_directory(FIXTURE)
        assert tokenizer.from_directory(src)("Once upon").input_ids == reference("Once upon").input_ids
    else:
        (src / "tokenizer.json").unlink()
        with pytest.raises(CheckpointError, match="cannot be read"):
            tokenizer.from_directory(src)
    assert not (tmp_path / "ran").exists()
