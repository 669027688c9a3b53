"""The conversation of a body, and its tools, for the chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from awq_jax.errors import ConfigError
from awq_jax.serve.engine.looking import Prompt
from awq_jax.server import pictures
from awq_jax.server.fields import Fields, parse
from awq_jax.server.problems import Problem
from awq_jax.server.service import Service
from awq_jax.server.tools import Style, style_of

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Talk:
    """A conversation.

    Attributes:
      messages: as the template reads them.
      tools: as the body has them; None for none.
      style: how calls of tools are told from text; None where there are none.
      variables: further ones of the template.
      images: files, in the order of their marks in the messages.
    """

    messages: Sequence[Mapping[str, object]]
    tools: Sequence[Mapping[str, object]] | None
    style: Style | None
    variables: Mapping[str, object]
    images: Sequence[bytes] = ()

    def prompt(self, service: Service) -> Prompt:
        """What the engine is given.

        Raises:
          Problem: the template does not take these messages, or an image cannot be read.
          AwqError: see `awq_jax.server.pictures.Processor.prompt`.
        """
        ids = [int(i) for i in self._rendered(service)]
        if not self.images:
            return service.engine.prepared(ids)
        assert service.processor is not None  # else there are no images
        images = pictures.decoded(self.images)
        text = str(self._rendered(service, tokenize=False))
        return service.engine.prepared(service.processor.prompt(ids, text, images))

    def _rendered(self, service: Service, **more: object) -> Any:
        template: Any = service.tokenizer.apply_chat_template
        given = more | ({"tools": list(self.tools)} if self.tools else {})
        try:
            return template(
                list(self.messages), add_generation_prompt=True, return_dict=False, **given, **self.variables
            )
        except ConfigError:
            raise
        except Exception as e:  # a template is a program that the client's messages run through
            text = f"the chat template does not take these messages: {type(e).__name__}: {str(e)[:300]}"
            raise Problem(text, param="messages") from None


def talk_of(service: Service, f: Fields) -> Talk:
    """The conversation that a body has.

    Raises:
      Problem: naming a field that is wrong.
    """
    have = service.tokenizer.chat_template
    if not have:
        raise Problem("the model has no chat template: use /v1/completions", code="no_chat_template")
    given = f.objects("messages")
    if not given:
        raise f.wrong("messages", "a list of messages, at least one")
    images = list[bytes]()
    messages = [_message(m, service.processor is not None, images) for m in given]
    if len(images) > pictures.MOST_IMAGES:
        raise Problem(f"there are {len(images)} images; at most {pictures.MOST_IMAGES} are taken", param="messages")
    listed = f.objects("tools")
    choice = f.data.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise f.wrong("tool_choice", '"auto" or "none": others are not supported')
    for tool in listed or ():
        function = tool.object("function")
        if tool.text("type", None) != "function" or function is None or not function.text("name", ""):
            raise Problem(
                f'{tool.where[:-1]} must be {{"type": "function", "function": {{"name": ...}}}}', param="tools"
            )
    used = None if choice == "none" or not listed else [t.data for t in listed]
    templates = have if isinstance(have, str) else " ".join(have.values())
    extra = f.object("chat_template_kwargs")
    reserved = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"}
    reserved |= {"conversation", "chat_template", "return_dict", "return_tensors"}
    if extra is not None and (clash := reserved & set(extra.data)):
        raise Problem(
            f"chat_template_kwargs has {sorted(clash)[0]!r}, which is not its to set", param="chat_template_kwargs"
        )
    return Talk(messages, used, style_of(templates) if used else None, extra.data if extra else {}, images)


def _message(m: Fields, looks: bool, images: list[bytes]) -> dict[str, object]:
    """A message for a template; those of models that look at images take contents as lists. Adds to ``images``."""
    role = m.text("role", "")
    if role not in ROLES:
        raise m.wrong("role", f"one of {', '.join(ROLES)}")
    content: object = m.data.get("content")
    if isinstance(content, list):
        parts = [_part(p, looks, images) for p in m.objects("content") or ()]
        content = parts if looks else "\n".join(part["text"] for part in parts)
    else:
        content = m.text("content", None)
        if looks and content is not None and role != "tool":
            content = [{"type": "text", "text": content}]
    called = m.objects("tool_calls")
    if content is None and not (role == "assistant" and called):
        raise m.wrong("content", "a string, or a list of parts")
    found: dict[str, object] = {"role": "system" if role == "developer" else role, "content": content or ""}
    for name in ("name", "tool_call_id"):
        if (value := m.text(name, None)) is not None:
            found[name] = value
    if called:
        found["tool_calls"] = [_called(c) for c in called]
    return found


def _part(p: Fields, looks: bool, images: list[bytes]) -> dict[str, str]:
    kind = p.data.get("type")
    if kind == "image_url":
        if not looks:
            told = "this model does not look at images: send text alone"
            raise Problem(told, code="no_images", param=f"{p.where}type")
        images.append(pictures.data_of(p))
        return {"type": "image"}
    if kind != "text":
        raise p.wrong("type", '"text" or "image_url": other parts are not supported')
    text = p.text("text", None)
    if text is None:
        raise p.wrong("text", "a string")
    return {"type": "text", "text": text}


def _called(c: Fields) -> dict[str, object]:
    """A call that the model made before. Templates want its arguments as an object, the API has them as JSON."""
    function = c.object("function")
    if function is None or not function.text("name", ""):
        raise c.wrong("function", 'an object with "name" and "arguments"')
    arguments: object = function.data.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse(arguments.encode("utf-8", "replace"))
        except Problem:
            raise function.wrong("arguments", "a JSON object, as a string") from None
    return {
        "id": c.text("id", ""),
        "type": "function",
        "function": {"name": function.data["name"], "arguments": arguments},
    }
