"""Tokenizers from ``tokenizer.json``: ids against the file's own and against ``PreTrainedTokenizerFast``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bpe_tokenizers import CHAT, FIXTURE, TEXTS, byte_level
from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from awq_jax import data
from awq_jax.convert import tokenizer
from awq_jax.convert.formats.gguf import tokenizer as gguf_tokenizer
from awq_jax.errors import ConfigError

SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
PROBES = [*TEXTS, "<|im_start|>user\nhi<|im_end|>  <think> a</think>b<|tool|>c", "How are you? it's 2023"]
# Class names of transformers 5 that rebuild the backend, or once did, by model_type.
CLASSES = [
    ("llama", "LlamaTokenizerFast"),
    ("llama", "LlamaTokenizer"),
    ("gemma", "GemmaTokenizerFast"),
    ("cohere", "CohereTokenizerFast"),
    ("granite", "GPT2Tokenizer"),
    ("olmo2", "GPT2Tokenizer"),
    ("qwen2", "Qwen2Tokenizer"),
    ("deepseek_v3", "LlamaTokenizerFast"),
    ("glm4", "PreTrainedTokenizerFast"),
    ("mistral", "TokenizersBackend"),
    ("gpt_neox", "GPTNeoXTokenizerFast"),
    ("phi3", "T5Tokenizer"),
    ("nonesuch", "SomebodysTokenizer"),
    ("nonesuch", None),
]


@pytest.fixture(scope="module")
def raw() -> Tokenizer:
    return byte_level("llama-bpe")


def directory(path: Path, t: Tokenizer, settings: dict[str, Any], **files: Any) -> Path:
    """A directory with a tokenizer; more files by stem."""
    path.mkdir(exist_ok=True)
    t.save(str(path / "tokenizer.json"))
    for stem, content in {"tokenizer_config": settings, **files}.items():
        (path / f"{stem}.json").write_text(json.dumps(content))
    return path


def token(content: str, **rules: bool) -> dict[str, Any]:
    rules = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True} | rules
    return {"__type": "AddedToken", "content": content, **rules}


@pytest.mark.parametrize(("model_type", "cls"), CLASSES)
def test_ids_are_those_of_the_file(tmp_path: Path, raw: Tokenizer, model_type: str, cls: str | None) -> None:
    settings = {**SPECIAL, "tokenizer_class": cls, "auto_map": {"AutoTokenizer": ["x.Y", "x.Y"]}}
    src = directory(tmp_path / "m", raw, settings, config={"model_type": model_type, "vocab_size": 700})
    got = tokenizer.from_directory(src)
    assert got is not None
    for text in PROBES:
        assert got([text])["input_ids"] == [raw.encode(text).ids]
        assert got.decode(raw.encode(text).ids) == raw.decode(raw.encode(text).ids, skip_special_tokens=False)
    assert gguf_tokenizer.metadata(got, {"vocab_size": 700})["tokenizer.ggml.pre"] == "llama-bpe"


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "default"])
def test_gguf_names_the_splitting_of_the_file(tmp_path: Path, pre: str) -> None:
    src = directory(tmp_path / "m", byte_level(pre), {**SPECIAL, "tokenizer_class": "LlamaTokenizerFast"})
    meta = gguf_tokenizer.metadata(tokenizer.from_directory(src), {"vocab_size": 700})
    assert meta["tokenizer.ggml.pre"] == {"default": "gpt-2"}.get(pre, pre)


SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "added": {
        "added_tokens_decoder": {
            "1": {k: v for k, v in token("<|im_start|>").items() if k != "__type"},
            "700": token("<|tool|>"),
            "701": token("<think>", special=False, rstrip=True),
            "702": token("</think>", special=False, lstrip=True),
        },
        "eos_token": "<|tool|>",
    },
    "additional": {"additional_special_tokens": ["<think>", token("</think>")], "pad_token": "<pad>"},
    "extra": {"extra_special_tokens": ["<think>", "<|tool|>"]},
    "named": {"extra_special_tokens": {"think_token": "<think>"}, "pad_token": token("<|tool|>", lstrip=True)},
    "words": {"mask_token": "us", "image_token": "it"},
    "split": {"split_special_tokens": True},
    "length": {"model_max_length": 77, "clean_up_tokenization_spaces": True},
    "no length": {"model_max_length": 1000000000000000019884624838656},
    "template": {"chat_template": CHAT},
    "templates": {"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]},
    "null": {"bos_token": None, "unk_token": None},
    "ends": {"add_bos_token": False, "add_eos_token": True},  # which this class does not heed
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_as_transformers_reads_them(tmp_path: Path, raw: Tokenizer, settings: str) -> None:
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL, **SETTINGS[settings]}
    src = directory(tmp_path / "m", raw, content)
    agree(tokenizer.from_directory(src), PreTrainedTokenizerFast.from_pretrained(src))


def agree(ours: Any, theirs: PreTrainedTokenizerFast) -> None:
    for text in PROBES:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours(text, add_special_tokens=special)["input_ids"] == ids
            assert ours.encode(text, add_special_tokens=special) == ids
            assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(ids, skip_special_tokens=special)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template", "model_max_length"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()


def test_what_older_releases_keep_in_files_of_their_own(tmp_path: Path, raw: Tokenizer) -> None:
    """special_tokens_map.json wins over tokenizer_config.json, unless that lists the added tokens itself."""
    more = {"special_tokens_map": {"eos_token": token("<|endoftext|>"), "additional_special_tokens": ["<think>"]}}
    src = directory(tmp_path / "m", raw, {**SPECIAL}, **more, added_tokens={"<think>": 700, "<|tool|>": 701})
    got: Any = tokenizer.from_directory(src)
    assert (got.eos_token, got.bos_token) == ("<|endoftext|>", "<|im_start|>")
    assert [got.convert_tokens_to_ids(t) for t in ("<think>", "<|tool|>")] == [700, 701]
    assert got.decode([700, 701], skip_special_tokens=True) == "<|tool|>"
    newer = directory(tmp_path / "n", raw, {**SPECIAL, "added_tokens_decoder": {}}, **more)
    assert tokenizer.from_directory(newer).eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("cls", "asked", "around"),
    [
        ("LlamaTokenizerFast", {}, (False, False)),  # then it is the file's own business
        ("LlamaTokenizerFast", {"add_bos_token": True}, (True, False)),
        ("LlamaTokenizer", {"add_eos_token": True}, (True, True)),
        ("GemmaTokenizerFast", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ("GPTNeoXTokenizerFast", {"add_eos_token": True}, (False, True)),
        ("PreTrainedTokenizerFast", {"add_bos_token": True}, (False, False)),
        ("Qwen2Tokenizer", {"add_bos_token": True}, (False, False)),
    ],
)
def test_tokens_around_a_text(
    tmp_path: Path, raw: Tokenizer, cls: str, asked: dict[str, bool], around: tuple[bool, bool]
) -> None:
    """As transformers 4 (4.57.6, by hand): these classes put what the settings ask for in the file's place."""
    got: Any = tokenizer.from_directory(directory(tmp_path / "m", raw, {**SPECIAL, "tokenizer_class": cls, **asked}))
    assert got("hi").input_ids == [1] * around[0] + raw.encode("hi").ids + [2] * around[1]
    assert got.encode("hi", add_special_tokens=False) == raw.encode("hi").ids


def test_a_class_may_take_the_tokens_of_the_file_away(tmp_path: Path) -> None:
    settings = json.loads((FIXTURE / "tokenizer_config.json").read_text())
    t = Tokenizer.from_file(str(FIXTURE / "tokenizer.json"))
    src = directory(tmp_path / "m", t, settings | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False})
    assert tokenizer.from_directory(src)(["hi"])["input_ids"] == [t.encode("hi", add_special_tokens=False).ids]


def test_what_the_file_cuts_and_pads_is_left_whole(tmp_path: Path) -> None:
    t = byte_level("llama-bpe")
    t.enable_truncation(4)
    t.enable_padding(length=8, pad_token="<|endoftext|>")
    t.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    got: Any = tokenizer.from_directory(directory(tmp_path / "m", t, SPECIAL))
    t.no_truncation()
    t.no_padding()
    for text in ("hi", TEXTS[0]):
        assert got(text)["input_ids"] == t.encode(text).ids
    assert got(TEXTS[0], truncation=True, max_length=4)["input_ids"] == t.encode(TEXTS[0]).ids[:4]


def test_named_templates_of_a_directory(tmp_path: Path, raw: Tokenizer) -> None:
    src = directory(tmp_path / "m", raw, {**SPECIAL, "chat_template": "old"})
    (src / "chat_template.jinja").write_text("new")
    assert tokenizer.from_directory(src).chat_template == "new"
    (src / "additional_chat_templates").mkdir()
    (src / "additional_chat_templates/tool_use.jinja").write_text("tools")
    both = {"default": "new", "tool_use": "tools"}
    got = tokenizer.from_directory(src)
    assert got.chat_template == both
    got.save_pretrained(str(tmp_path / "saved"))
    for reader in (tokenizer.from_directory, PreTrainedTokenizerFast.from_pretrained):
        assert reader(tmp_path / "saved").chat_template == both
    meta = gguf_tokenizer.metadata(got, {"vocab_size": 700})
    assert (meta["tokenizer.chat_template"], meta["tokenizer.chat_templates"]) == ("new", ["tool_use"])
    assert tokenizer.from_gguf(meta).chat_template == both


def test_names_of_templates_stay_in_the_directory() -> None:
    meta = gguf_tokenizer.metadata(PreTrainedTokenizerFast(tokenizer_object=byte_level("qwen2")), {"vocab_size": 700})
    named = {"tokenizer.chat_templates": ["../x", "ok"], "tokenizer.chat_template.../x": "a"}
    assert tokenizer.from_gguf({**meta, **named, "tokenizer.chat_template.ok": "b"}).chat_template == {"ok": "b"}


def test_saved_for_transformers(tmp_path: Path, raw: Tokenizer) -> None:
    settings = {**SPECIAL, "pad_token": "<pad>", "model_max_length": 99, "chat_template": CHAT, "image_token": "<img>"}
    got: Any = tokenizer.from_directory(directory(tmp_path / "m", raw, settings))
    got.save_pretrained(tmp_path / "saved")
    agree(got, PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved"))
    agree(tokenizer.from_directory(tmp_path / "saved"), PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved"))


def test_calls_as_users_of_transformers_write_them(tmp_path: Path, raw: Tokenizer) -> None:
    src = directory(tmp_path / "m", raw, {**SPECIAL, "pad_token": "<|endoftext|>"})
    ours: Any = tokenizer.from_directory(src)
    theirs = PreTrainedTokenizerFast.from_pretrained(src)
    texts = ["hello there", "x"]
    for got in (ours, theirs):
        padded = got(texts, padding=True, return_tensors="np")
        assert padded["input_ids"].shape == padded.attention_mask.shape
        assert (padded.input_ids[1, 1:] == 0).all()
        assert padded.attention_mask.sum() == sum(map(len, got(texts)["input_ids"]))
    assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]
    ids = ours("hello there").input_ids
    for form in (ids, np.array(ids), np.array(ids, np.int32).tolist(), ids[0]):
        assert ours.decode(form) == theirs.decode(form)
    assert ours.batch_decode([ids, ids[:1]]) == theirs.batch_decode([ids, ids[:1]])
    assert ours.tokenize("hello <|im_end|>") == theirs.tokenize("hello <|im_end|>")
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert ours.convert_tokens_to_ids(["<|im_end|>", "a"]) == theirs.convert_tokens_to_ids(["<|im_end|>", "a"])
    assert sorted(ours.all_special_ids) == sorted(theirs.all_special_ids)
    assert ours.vocab_size == theirs.vocab_size
    assert "700 tokens" in repr(ours)
    for bad in ({"return_tensors": "pt"}, {"return_tensors": "np"}):
        with pytest.raises(ConfigError, match=r"return_tensors|different lengths"):
            ours(texts, **bad)
    with pytest.raises(ConfigError, match="takes a text or a list of texts"):
        ours([1, 2])
    with pytest.raises(ConfigError, match="use batch_decode"):
        ours.decode([[1], [2]])
    ours.pad_token = None
    with pytest.raises(ConfigError, match="needs a pad token"):
        ours(texts, padding=True)


def test_tokenizers_of_both_kinds_are_taken(tmp_path: Path, raw: Tokenizer) -> None:
    src = directory(tmp_path / "m", raw, SPECIAL)
    both = [tokenizer.from_directory(src), PreTrainedTokenizerFast.from_pretrained(src)]
    sets = [data.load(TEXTS, t, samples=2, seq_len=16, vocab_size=700).tokens.tolist() for t in both]
    assert sets[0] == sets[1]
    assert data.encode(TEXTS[0], both[0]).tolist() == data.encode(TEXTS[0], both[1]).tolist()


def test_rules_for_white_space_reach_the_backend(tmp_path: Path) -> None:
    t = byte_level("llama-bpe")
    t.add_tokens([AddedToken("<think>", rstrip=True)])
    src = directory(tmp_path / "m", t, SPECIAL)
    agree(tokenizer.from_directory(src), PreTrainedTokenizerFast.from_pretrained(src))


def test_transformers_is_not_imported(tmp_path: Path, raw: Tokenizer) -> None:
    src = directory(tmp_path / "m", raw, {**SPECIAL, "tokenizer_class": "LlamaTokenizerFast", "chat_template": CHAT})
    program = (
        "import sys, pathlib; from awq_jax.convert import tokenizer\n"
        "t = tokenizer.from_directory(pathlib.Path(sys.argv[1]))\n"
        "t.apply_chat_template([{'role': 'user', 'content': 'hi'}])\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(src)], check=True, timeout=60)
