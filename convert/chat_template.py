"""Chat templates: Jinja in a sandbox, with the helpers that Hugging Face's templates use.

The environment is that of ``transformers.utils.chat_template_utils``: a template renders the same text here.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from typing import NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from awq_jax.errors import CheckpointError, ConfigError, needed

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field; templates read the first or second
CUT = "CONTINUE_FINAL_MESSAGE_TAG "  # at its end a space, to see whether the template strips text


def render(
    template: str,
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[Mapping[str, object] | Callable[..., object]] | None = None,
    documents: Sequence[Mapping[str, object]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **variables: object,
) -> str:
    """One conversation as text.

    Args:
      template: Jinja source; it sees plain values only, never objects.
      messages: the conversation.
      tools: JSON schemas, or functions with type hints and docstrings.
      documents: for templates that know them.
      add_generation_prompt: end with what begins an answer.
      continue_final_message: leave the last message open, for the model to go on with.
      variables: further ones the template may read, such as ``bos_token``; ``today``, a date, stands for the clock.

    Raises:
      CheckpointError: the template is no Jinja.
      ConfigError: there is no message, or the template refuses these.
    """
    talk = [_message(m) for m in messages]
    if not talk:
        raise ConfigError("a chat needs at least one message")
    if continue_final_message:
        if add_generation_prompt:
            raise ConfigError("continue_final_message and add_generation_prompt exclude each other")
        _mark(talk[-1])
    schemas = None if tools is None else [_plain(t if isinstance(t, Mapping) else _schema(t)) for t in tools]
    given: dict[str, object] = {"tools": schemas, "documents": _plain(documents)}
    given["add_generation_prompt"] = add_generation_prompt
    if isinstance(today := variables.pop("today", None), date):
        given["strftime_now"] = today.strftime
    try:
        text = _compiled(template).render(messages=talk, **given, **{k: _plain(v) for k, v in variables.items()})
    except jinja2.TemplateSyntaxError as e:
        raise CheckpointError(f"the chat template is damaged: {e.message} (line {e.lineno})") from e
    except Exception as e:  # a template's own words, or whatever its expressions raise
        raise ConfigError(f"the chat template does not take these messages: {type(e).__name__}: {str(e)[:500]}") from e
    return _cut(text) if continue_final_message else text


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, which marks what the model wrote: the text inside is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _tojson(
    x: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _message(message: Mapping[str, object]) -> dict[str, object]:
    """Plain values, without what is null, and reasoning under the names that templates read."""
    if not isinstance(message, Mapping):
        raise ConfigError(f"a chat's messages are dicts of role and content; got {str(message)[:100]!r}")
    plain = {str(k): _plain(v) for k, v in message.items() if v is not None}
    thought = next((plain[k] for k in REASONING if k in plain), None)
    return plain if thought is None else {"thinking": thought, **plain, "reasoning_content": thought}


def _plain(value: object) -> object:
    """Values as JSON has them; an image or an array, which no template reads, is the name of its type."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return f"<{type(value).__name__}>"


def _schema(tool: Callable[..., object]) -> Mapping[str, object]:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    utils = needed("transformers.utils", "a tool that is a function")  # which takes a second
    schema: Mapping[str, object] = utils.get_json_schema(tool)
    return schema


def _mark(message: dict[str, object]) -> None:
    """Put `CUT` where the last message's text ends."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + CUT
        return
    texts = [p for p in content if isinstance(p, dict) and "text" in p] if isinstance(content, list) else []
    if not texts:
        raise ConfigError("continue_final_message: the last message has no text to continue")
    texts[-1]["text"] = f"{texts[-1]['text']}{CUT}"


def _cut(text: str) -> str:
    """The text before `CUT`; without white space at its end, where the template strips messages."""
    before, mark, after = text.rpartition(CUT.strip())
    if not mark:
        raise ConfigError("continue_final_message: the chat template leaves out the text of the last message")
    return before if after.startswith(" ") else before.rstrip()
