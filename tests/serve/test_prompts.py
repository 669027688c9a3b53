"""Prompts as ids: with our tokenizer and with transformers' of the same file, through chat templates by name."""

from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
from transformers import PreTrainedTokenizerFast

from awq_jax.convert import tokenizer
from awq_jax.errors import ConfigError
from awq_jax.serve import prompts
from awq_jax.serve.detokenize import Detokenizer

TALK = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "où?"}]
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny_checkpoints.tokenizer().save_pretrained(directory)
    return [tokenizer.from_directory(Path(directory)), PreTrainedTokenizerFast.from_pretrained(directory)]


@pytest.mark.parametrize("prompt", ["hi", ["hi", "où"], ["hi", [1, 2]], TALK, [TALK, TALK[1:]]])
def test_both_kinds_of_tokenizer_give_the_same_ids(both: list[Any], prompt: Any) -> None:
    chat = not isinstance(prompt, str) and not isinstance(prompt[0], str)
    ours, theirs = (prompts.encode(t, prompt, chat) for t in both)
    assert ours == theirs
    assert all(isinstance(i, int) for row in ours for i in row)


def test_named_templates_and_those_that_refuse(both: list[Any]) -> None:
    for t in both:
        t.chat_template = {"default": GEMMA, "tool_use": "x"}
    ours, theirs = (prompts.encode(t, "hi ", chat=True) for t in both)
    assert ours == theirs
    assert both[0].decode(ours[0]) == "<s><user>hi\n"
    with pytest.raises(ConfigError, match="does not take these messages: TemplateError: System role not supported"):
        prompts.encode(both[0], TALK, chat=True)


def test_streamed_text_is_the_same(both: list[Any]) -> None:
    ids = both[0].encode("naïve 🙂 <s> text")
    texts = []
    for t in both:
        stream = Detokenizer(t, ids[:2])
        texts.append("".join(stream.push(i) for i in ids[2:]) + stream.finish())
    assert texts[0] == texts[1] == "ïve 🙂  text"


def test_ends_of_an_answer(both: list[Any]) -> None:
    for t in both:
        assert prompts.eos_ids({"eos_token_id": [3]}, {"text_config": {"eos_token_id": 4}}, t) == (3, 4, 257)
