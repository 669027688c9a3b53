"""Tool calls in the text of an answer, for the families whose chat template defines them.

Hermes and Qwen: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number of them, with text before.
Llama 3: the whole answer is ``{"name": ..., "parameters": {...}}``, or several with ``;`` between.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from typing import Literal

Style = Literal["hermes", "llama3"]
OPEN, CLOSE, PYTHON = "<tool_call>", "</tool_call>", "<|python_tag|>"


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a function; ``arguments`` are JSON."""

    name: str
    arguments: str

    def body(self, index: int | None = None) -> dict[str, object]:
        """As the OpenAI API has it; with an ``index`` in streams."""
        function = {"name": self.name, "arguments": self.arguments}
        body: dict[str, object] = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        return body if index is None else {"index": index} | body


def style_of(template: str) -> Style | None:
    """How a model says that it calls a tool, by its chat template; None if it does not."""
    if OPEN in template:
        return "hermes"
    if '"parameters"' in template and ("python_tag" in template or "ipython" in template):
        return "llama3"
    return None


class Parser:
    """Separates the text of an answer from its calls, as it comes.

    Args:
      style: see `style_of`.

    Attributes:
      calls: how many were found.
    """

    def __init__(self, style: Style):
        self.style, self.held, self.calls = style, "", 0

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Text that is no call, and the calls that are complete."""
        self.held += text
        return self._hermes(last=False) if self.style == "hermes" else self._llama(last=False)

    def finish(self) -> tuple[str, list[Call]]:
        """The rest: what looked like a call and is none is text."""
        return self._hermes(last=True) if self.style == "hermes" else self._llama(last=True)

    def _hermes(self, last: bool) -> tuple[str, list[Call]]:
        said, calls = "", []
        while self.held:
            before, opened, rest = self.held.partition(OPEN)
            if not opened:
                keep = 0 if last else _begun(self.held, OPEN)
                said, self.held = said + self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
                break
            inside, closed, after = rest.partition(CLOSE)
            if not closed and not last:
                said, self.held = said + before, opened + rest
                break
            call = _call(inside, "arguments")
            said += before if call is not None else before + opened + inside + closed
            calls += [] if call is None else [call]
            self.held = after
        if calls or self.calls:
            said = said.strip("\n") if not said.strip() else said
        self.calls += len(calls)
        return said, calls

    def _llama(self, last: bool) -> tuple[str, list[Call]]:
        text = self.held.strip().removeprefix(PYTHON).strip()
        if not last and (not text or text.startswith("{") or PYTHON.startswith(text)):
            return "", []
        found = [_call(part, "parameters") for part in _objects(text)] if text.startswith("{") else []
        calls = [c for c in found if c is not None]
        said, self.held = ("", "") if calls and len(calls) == len(found) else (self.held, "")
        if said:
            calls = []
        self.calls += len(calls)
        return said, calls


def _call(text: str, arguments: str) -> Call | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    given = found.get(arguments, found.get("arguments", {}))
    return Call(found["name"], given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))


def _objects(text: str) -> list[str]:
    """The JSON objects of a text that has nothing else but ``;`` between them; the text itself if it has."""
    decoder, found, at = json.JSONDecoder(), [], 0
    try:
        while at < len(text):
            _, end = decoder.raw_decode(text, at)
            found.append(text[at:end])
            at = end
            while at < len(text) and text[at] in "; \n":
                at += 1
    except (ValueError, RecursionError):
        return [text]
    return found


def _begun(text: str, mark: str) -> int:
    """Length of the longest end of a text that begins a mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
