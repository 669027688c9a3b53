"""Answers that must fit a JSON schema, through llguidance (an extra: ``pip install llguidance``)."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import numpy as np

from awq_jax.convert.text import Tokenizer
from awq_jax.errors import ConfigError, EngineError, MissingPackageError
from awq_jax.serve.engine.drawing import packed_width
from awq_jax.serve.engine.request import Constraint
from awq_jax.server.fields import Fields
from awq_jax.server.problems import Problem
from awq_jax.server.service import Service

ANY: dict[str, object] = {"type": "object"}


def grammar_of(f: Fields) -> str | None:
    """The JSON schema that ``response_format`` asks for; None for any text.

    Raises:
      Problem: it is none that there is.
    """
    given = f.object("response_format")
    if given is None or (kind := given.text("type", "")) == "text":
        return None
    if kind == "json_object":
        return json.dumps(ANY)
    own = given.object("json_schema") if kind == "json_schema" else None
    schema = None if own is None else own.object("schema")
    if schema is None:
        raise given.wrong("type", '"text", "json_object", or "json_schema" with a json_schema.schema')
    return json.dumps(schema.data)


def constraints(service: Service, schema: str | None, count: int) -> list[Constraint | None]:
    """One for each choice.

    Raises:
      MissingPackageError: llguidance is not installed.
      ConfigError: the tokenizer is none that it reads.
      Problem: the schema is none that it knows.
    """
    if schema is None:
        return [None] * count
    llguidance = _package()
    tokenizer = service.tokenizer
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigError("JSON schemas need the model's own tokenizer.json")
    vocabulary = service.engine.programs.vocabulary
    read = _tokenizer(tokenizer.backend_tokenizer.to_str(), vocabulary, service.engine.ends)
    # As `json.dumps` writes it: else a small model may go on with white space for ever.
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    failed, says = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, read)
    if failed:
        raise Problem(f"the JSON schema cannot be followed: {' '.join(says)[:500]}", param="response_format")
    return [Guided(llguidance.LLMatcher(read, grammar), vocabulary) for _ in range(count)]


@dataclasses.dataclass
class Guided:
    """One answer's place in a grammar."""

    matcher: Any
    vocabulary: int

    def allowed(self) -> np.ndarray:
        """See `awq_jax.serve.engine.request.Constraint`."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        found = np.zeros(packed_width(self.vocabulary), np.uint8)
        found[: len(bits)] = bits[: len(found)]
        if not found.any():
            raise EngineError(f"no token fits the JSON schema any more: {self.matcher.get_error()}")
        return found

    def accept(self, token: int) -> None:
        """See `awq_jax.serve.engine.request.Constraint`."""
        self.matcher.consume_token(token)


def _package() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError:
        text = "JSON schemas need the package llguidance on the server: pip install llguidance"
        raise MissingPackageError(text) from None
    return llguidance


@functools.lru_cache(maxsize=2)
def _tokenizer(text: str, vocabulary: int, ends: tuple[int, ...]) -> Any:
    return _package().LLTokenizer(text, n_vocab=vocabulary, eos_token=list(ends) or None)
