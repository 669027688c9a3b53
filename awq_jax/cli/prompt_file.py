"""A file of prompts: one a line of text, or JSON objects with ``prompt`` or ``messages``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from awq_jax.convert.text import TokenizerLike
from awq_jax.errors import AwqError, ConfigError
from awq_jax.models.config import ModelConfig
from awq_jax.serve import generate, prompts

NAMED = 5  # bad lines that a message names


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Attributes:
      given: ``prompt`` or ``messages``, and ``adapter`` if it names one, as the file has them.
      ids: its token ids.
    """

    given: dict[str, Any]
    ids: list[int]


def read(path: Path, tokenizer: TokenizerLike | None, config: ModelConfig, chat: bool) -> list[Prompt]:
    """The prompts of a file, all of which can be continued.

    Args:
      path: a ``.jsonl`` file, whose lines are objects with a text ``prompt`` or with ``messages``, which go through
        the chat template; of any other file each line is a prompt. Empty lines of both are skipped.
      tokenizer, config: of the model.
      chat: wrap texts in the chat template too.

    Raises:
      ConfigError: the file is not readable text or has no prompts, or naming its bad lines by number.
    """
    prompts.needed(tokenizer)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        where = 1 + e.object[: e.start].count(b"\n")
        raise ConfigError(f"{path}: line {where}: not UTF-8 text (byte {e.start})") from None
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror or e}") from None
    found: list[Prompt] = []
    bad: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines, which knows more ends of lines than files do
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        try:
            found.append(_prompt(line, path.suffix == ".jsonl", tokenizer, config, chat))
        except AwqError as e:
            bad.append(f"line {number}: {e}")
    if bad:
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise ConfigError(f"{path}: {'; '.join(bad[:NAMED])}{more}")
    if not found:
        raise ConfigError(f"{path} has no prompts")
    return found


def _prompt(line: str, rows: bool, tokenizer: TokenizerLike | None, config: ModelConfig, chat: bool) -> Prompt:
    given: Any = {"prompt": line}
    if rows:
        try:
            given = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"not JSON ({e})") from None
        keys = [k for k in ("prompt", "messages") if isinstance(given, dict) and k in given]
        if len(keys) != 1:
            raise ConfigError('not an object with either "prompt" or "messages"')
        if not isinstance(given.get("adapter"), str | None):
            raise ConfigError('"adapter" is not the name of one')
        given = {key: given[key] for key in (keys[0], "adapter") if key in given}
    if "prompt" in given:
        if not isinstance(given["prompt"], str) or not given["prompt"]:
            raise ConfigError('"prompt" is not a text')
        [ids] = prompts.encode(tokenizer, given["prompt"], chat)
    else:
        talk = given["messages"]
        if not isinstance(talk, list) or not talk or not all(isinstance(m, dict) for m in talk):
            raise ConfigError('"messages" is not a list of {"role", "content"}')
        [ids] = prompts.encode(tokenizer, talk, True)
    generate.check_prompt(config, ids, "it")
    return Prompt(given, ids)
