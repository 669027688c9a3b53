"""Fields of a JSON body, with their types: what is wrong is named."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TypeVar, cast

from awq_jax.server.problems import Problem

T = TypeVar("T")
Json = Mapping[str, object]


def parse(body: bytes) -> Json:
    """A body that is a JSON object.

    Raises:
      Problem: it is none.
    """
    try:
        found = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise Problem(f"the body is not JSON in UTF-8: {str(e)[:200]}") from None
    if not isinstance(found, dict):
        raise Problem(f"the body is a JSON {type(found).__name__}, not an object")
    return found


class Fields:
    """Reads the fields of one object.

    Args:
      data: the object.
      where: what stands before a name in messages, such as ``messages[0].``.
    """

    def __init__(self, data: Json, where: str = ""):
        self.data, self.where = data, where

    def wrong(self, name: str, must: str) -> Problem:
        """A field is not what it must be."""
        value = self.data.get(name)
        shown = json.dumps(value, default=str)[:100] if not isinstance(value, float) else repr(value)
        return Problem(f"{self.where}{name} must be {must}; got {shown}", param=f"{self.where}{name}")

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from ``low`` to ``high``; null is the default."""
        value = self.data.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number")
        if not math.isfinite(value) or not low <= value <= high:
            raise self.wrong(name, f"from {low:g} to {high:g}")
        return value

    def whole(self, name: str, default: T, low: int, high: int) -> int | T:
        """A whole number from ``low`` to ``high``; null is the default."""
        value = self.data.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "a whole number")
        if not low <= value <= high:
            raise self.wrong(name, f"from {low} to {high}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false; null is the default."""
        value = self.data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: T) -> str | T:
        """A text; null is the default."""
        value = self.data.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return self.encodable(value, name)

    def encodable(self, value: str, name: str) -> str:
        """A text that UTF-8 can hold: half of a surrogate pair is none."""
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.wrong(name, "text without half surrogate pairs") from None
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A text, or several, none of them empty; null is none."""
        value = self.data.get(name)
        if value is None:
            return ()
        several = [value] if isinstance(value, str) else value
        if not isinstance(several, list) or not all(isinstance(v, str) and v for v in several) or len(several) > most:
            raise self.wrong(name, f"a non-empty string, or up to {most} of such")
        return tuple(self.encodable(v, name) for v in several)

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids; null is none."""
        value = self.data.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(_is_id(v) for v in value):
            raise self.wrong(name, "a list of token ids")
        return tuple(value)

    def object(self, name: str) -> Fields | None:
        """An object; null is none."""
        value = self.data.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(cast(Json, value), f"{self.where}{name}.")

    def objects(self, name: str) -> list[Fields] | None:
        """A list of objects; null is none."""
        value = self.data.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise self.wrong(name, "a list of objects")
        return [Fields(v, f"{self.where}{name}[{i}].") for i, v in enumerate(value)]


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def is_ids(value: object) -> bool:
    """Whether something is a list of token ids, at least one."""
    return isinstance(value, list) and bool(value) and all(map(_is_id, value))
