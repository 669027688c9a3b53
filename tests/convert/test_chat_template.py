"""Chat templates against transformers' own rendering of the same template, text and ids."""

from __future__ import annotations

import enum
import re
from typing import Any

import jinja2
import numpy as np
import pytest
from bpe_tokenizers import byte_level
from transformers import PreTrainedTokenizerFast

from awq_jax.convert import chat_template
from awq_jax.convert.text import Tokenizer
from awq_jax.errors import CheckpointError, ConfigError

# As published: by the way each family writes its templates, not word by word.
TEMPLATES = {
    "chatml": """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "llama3": """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content + '<|eot_id|>' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    "mistral": """{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}
    {%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + message.content + '[/INST]' }}
        {%- else %}{{- '[INST] ' + message.content + '[/INST]' }}{%- endif %}
    {%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}
{%- endfor %}""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}
{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim +
'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}""",
    "tools": """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- for tool_call in message.tool_calls %}{%- if tool_call.function is defined %}
            {%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson(indent=2) }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
    {%- elif message.content is defined and message.content %}{{- message.role + ': ' + message.content }}{%- endif %}
    {%- if message.thinking is defined %}{{- '<think>' + message.thinking + '</think>' }}{%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}""",
    "parts": """{% for message in messages %}{{ message['role'].upper() }}:{% if message['content'] is string %}
 {{ message['content'] }}{% else %}{% for c in message['content'] | selectattr('type', 'equalto', 'image') %}<image>
{% endfor %}{% for c in message['content'] if c.type == 'text' %} {{ c['text'] }}{% endfor %}{% endif %}\n
{% endfor %}""",
    "machinery": """{%- macro quoted(x) -%}"{{ x }}"{%- endmacro -%}
{% set ns = namespace(seen=0, last=none) %}
{% for message in messages %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {% generation %}{{ quoted(message.content | string | truncate(20)) }}{% set ns.seen = ns.seen + 1 %}
{% endgeneration %}
    {% if ns.seen == 3 %}{% break %}{% endif %}
{% endfor %}
{{ ns.seen }} {{ strftime_now('%Y') }} {{ {'ä': '<b>&', 'n': [1, none, true, 1.5]} | tojson }} {{ tools is none }}
{{- documents is none }} {{ enable_thinking | default('unset') }} {{ messages | map(attribute='role') | join(',') }}""",
}
USER = {"role": "user", "content": " What's 2 < 3 & 'so' on?\n"}
ANSWER = {"role": "assistant", "content": "Yes — “true” 🤗. "}
TALKS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "two": [USER, ANSWER, {"role": "user", "content": "thanks"}],
    "system": [{"role": "system", "content": "Be terse."}, USER, ANSWER],
    "parts": [{"role": "user", "content": [{"type": "image", "image": np.ones(2)}, {"type": "text", "text": "what?"}]}],
    "tool": [
        USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"é": [1, "<2>"]}}}],
        },
        {"role": "tool", "content": "3"},
    ],
    "thought": [USER, ANSWER | {"reasoning_content": "hm"}],
}


def weather(city: str, days: int = 1) -> str:
    """Tell the weather.

    Args:
        city: Where.
        days: How many days ahead.
    """
    return city * days


TOOL = {"type": "function", "function": {"name": "add", "description": "x < y", "parameters": {"type": "object"}}}


def text_or_problem(theirs: Any, talk: list[dict[str, Any]], given: dict[str, Any]) -> tuple[str | None, str]:
    try:
        return theirs.apply_chat_template(talk, tokenize=False, **given), ""
    except (jinja2.TemplateError, TypeError) as e:
        return None, str(e)


@pytest.fixture(scope="module")
def pair() -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """Ours and transformers', of the same backend."""
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    raw = byte_level("llama-bpe")
    return Tokenizer(raw, special), PreTrainedTokenizerFast(tokenizer_object=raw, **special)


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_in_transformers(pair: Any, template: str) -> None:
    ours, theirs = pair
    refused = 0
    for talk in TALKS.values():
        for more in ({}, {"add_generation_prompt": True, "enable_thinking": False}, {"tools": [TOOL, weather]}):
            given = {"chat_template": TEMPLATES[template], **more}
            want, problem = text_or_problem(theirs, talk, given)
            if want is None:
                refused += 1
                with pytest.raises(ConfigError, match=f"does not take these messages.*{re.escape(problem)}"):
                    ours.apply_chat_template(talk, tokenize=False, **given)
                continue
            assert ours.apply_chat_template(talk, tokenize=False, **given) == want
            ids = theirs.apply_chat_template(talk, return_dict=False, **given)
            assert ours.apply_chat_template(talk, return_dict=False, **given) == ids
    assert refused < 3 * len(TALKS) / 2 + 2


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral"])
def test_the_last_message_can_be_continued(pair: Any, template: str) -> None:
    ours, theirs = pair
    given = {"chat_template": TEMPLATES[template], "continue_final_message": True, "tokenize": False}
    text = ours.apply_chat_template([USER, ANSWER], **given)
    assert text == theirs.apply_chat_template([USER, ANSWER], **given)
    assert text.rstrip().endswith("🤗.")


def test_forms_of_the_result(pair: Any) -> None:
    ours, theirs = pair
    both: list[Any] = []
    for t in (ours, theirs):
        talks = [TALKS["one"], TALKS["two"]]
        batch = t.apply_chat_template(talks, chat_template=TEMPLATES["chatml"])["input_ids"]
        bare = t.apply_chat_template(talks[0], chat_template=TEMPLATES["chatml"], return_dict=False)
        array = t.apply_chat_template(talks[0], chat_template=TEMPLATES["chatml"], return_tensors="np").input_ids
        both.append((batch, bare, array.tolist()))
    assert both[0] == both[1]


def test_templates_by_name(pair: Any) -> None:
    for t in pair:
        t.chat_template = {"default": "D{{ messages[0].content }}", "tool_use": "T", "rag": "R{{ documents | length }}"}
        talk = [{"role": "user", "content": "x"}]
        assert t.apply_chat_template(talk, tokenize=False) == "Dx"
        assert t.apply_chat_template(talk, tools=[TOOL], tokenize=False) == "T"
        documents = [{"title": "a", "text": "b"}]
        assert t.apply_chat_template(talk, documents=documents, chat_template="rag", tokenize=False) == "R1"
        t.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        pair[0].apply_chat_template(talk)
    pair[0].chat_template = {"rag": "x"}
    with pytest.raises(ConfigError, match=r"no default chat template.*\['rag'\]"):
        pair[0].apply_chat_template(talk)


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{% for m in messages %}", CheckpointError, r"the chat template is damaged: .* \(line 1\)"),
        ("{{ raise_exception('only cats') }}", ConfigError, "TemplateError: only cats"),
        ("{{ messages[0].content + 1 }}", ConfigError, "TypeError"),
        ("{{ nothing.at.all }}", ConfigError, "UndefinedError: 'nothing' is undefined"),
        ("{% for i in range(10000000) %}x{% endfor %}", ConfigError, "OverflowError"),
        ("{{ messages.append(1) }}", ConfigError, "SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", ConfigError, "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", ConfigError, "(SecurityError|UndefinedError)"),
        ("{{ lipsum.__globals__['os'].popen('true').read() }}", ConfigError, "(SecurityError|UndefinedError)"),
    ],
)
def test_what_a_template_may_not(template: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        chat_template.render(template, TALKS["one"])


def test_a_template_sees_plain_values() -> None:
    class Role(enum.StrEnum):
        USER = "user"

    class Sneaky(str):
        def write(self) -> str:
            raise AssertionError("a template called a method of ours")

    talk = [{"role": Role.USER, "content": [Sneaky("a"), np.ones(2), {"n": True}]}]
    template = (
        "{{ messages[0].role }}{{ messages[0].content[0] }}{{ messages[0].content[1] }}{{ messages[0].content[2] }}"
    )
    assert chat_template.render(template, talk) == "usera<ndarray>{'n': True}"
    with pytest.raises(ConfigError, match=r"UndefinedError.*write"):
        chat_template.render("{{ messages[0].content[0].write() }}", talk)


@pytest.mark.parametrize(
    ("talk", "more", "message"),
    [
        ([], {}, "at least one message"),
        ([1], {}, "dicts of role and content; got '1'"),
        ([USER], {"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
        ([{"role": "user"}], {"continue_final_message": True}, "no text to continue"),
        ([USER], {"continue_final_message": True}, "leaves out the text"),
    ],
)
def test_messages_that_are_none(talk: list[Any], more: dict[str, bool], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chat_template.render("{{ messages | length }}", talk, **more)


def test_arguments_that_transformers_has_and_ours_not(pair: Any) -> None:
    with pytest.raises(ConfigError, match="no return_assistant_tokens_mask"):
        pair[0].apply_chat_template([USER], chat_template="x", return_assistant_tokens_mask=True)
