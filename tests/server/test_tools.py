"""Calls of tools in text, whole and piece by piece; and through a chat template."""

from __future__ import annotations

import json
import random

import pytest

from awq_jax.server.tools import Call, Parser, style_of

HERMES = [
    ("Hello", "Hello", []),
    ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "", [Call("f", '{"x": 1}')]),
    (
        'Look: <tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g", "arguments": {"é": "<"}}'
        "</tool_call>",
        "Look: ",
        [Call("f", "{}"), Call("g", '{"é": "<"}')],
    ),
    ("<tool_call>no JSON</tool_call> so", "<tool_call>no JSON</tool_call> so", []),
    ('cut <tool_call>{"name": "f"', 'cut <tool_call>{"name": "f"', []),
    ("a < b <tool", "a < b <tool", []),
]
LLAMA = [
    ("Hello {you}", "Hello {you}", []),
    ('{"name": "f", "parameters": {"x": "1"}}', "", [Call("f", '{"x": "1"}')]),
    (
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
        "",
        [Call("f", "{}"), Call("g", "{}")],
    ),
    ('{"answer": 42}', '{"answer": 42}', []),
    ('{"name": "f", "parameters": {}} and more', '{"name": "f", "parameters": {}} and more', []),
    ('{"name": "f", "para', '{"name": "f", "para', []),
]


def parsed(style, pieces):
    parser = Parser(style)
    found = [*map(parser.push, pieces), parser.finish()]
    return "".join(text for text, _ in found), [call for _, calls in found for call in calls]


@pytest.mark.parametrize(
    ("style", "text", "said", "calls"),
    [(style, *case) for style, cases in (("hermes", HERMES), ("llama3", LLAMA)) for case in cases],
)
def test_calls_are_told_from_text_however_it_arrives(style, text, said, calls):
    rng = random.Random(0)
    for size in (len(text), 1, 3, 7):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        got = parsed(style, pieces)
        assert (got[0].strip(), got[1]) == (said.strip(), calls)
    cuts = sorted(rng.sample(range(len(text) + 1), 2))
    assert parsed(style, [text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]])[1] == calls


def test_text_before_a_call_is_not_held_back():
    parser = Parser("hermes")
    assert parser.push("I will look ") == ("I will look ", [])
    assert parser.push("<tool") == ("", [])
    assert parser.push("box>") == ("<toolbox>", [])


def test_styles_are_read_from_templates():
    assert style_of("{{ '<tool_call>' }}") == "hermes"
    assert style_of('{"name": ..., "parameters": ...} <|python_tag|>') == "llama3"
    assert style_of("{{ messages }}") is None


def test_a_call_in_openai_s_shape():
    body = Call("f", '{"x": 1}').body(0)
    assert (body["index"], body["type"]) == (0, "function")
    assert str(body["id"]).startswith("call_")
    function = body["function"]
    assert isinstance(function, dict)
    assert json.loads(function["arguments"]) == {"x": 1}
