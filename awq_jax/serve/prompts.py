"""What a model is asked, as token ids, and the ids that end its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from awq_jax.convert.config_json import HfConfig
from awq_jax.data import TextTokenizer
from awq_jax.errors import ConfigError

Message = Mapping[str, object]  # ``{"role": ..., "content": ...}``
Prompt = str | Sequence[int] | Sequence[Message]  # a text, token ids, or (with ``chat``) a conversation


class Tokenizer(TextTokenizer, Protocol):
    """What generation needs of a transformers tokenizer."""

    chat_template: Any

    def apply_chat_template(self, conversation: object, *, add_generation_prompt: bool, return_dict: bool) -> Any:
        """The ids of a conversation up to where the answer begins."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """The text of ids."""


def encode(tokenizer: Tokenizer, prompt: str | Sequence[Message] | Sequence[Prompt], chat: bool) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
      tokenizer: of transformers.
      prompt: a text, or texts or lists of token ids; with ``chat`` a list of ``{"role", "content"}`` is one
        conversation, and a text is a user's message.
      chat: wrap the prompts in the tokenizer's chat template.

    Raises:
      ConfigError: there is no chat template.
    """
    if isinstance(prompt, str):
        prompt = [prompt]
    if not chat:
        return [tokenizer(p)["input_ids"] if isinstance(p, str) else list(cast(Sequence[int], p)) for p in prompt]
    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template; generate without chat")
    one = bool(prompt) and isinstance(prompt[0], Mapping)
    talks = [prompt] if one else [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompt]
    return [tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False) for t in talks]


def eos_ids(generation: HfConfig, config: HfConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Ids that end an answer: those of both files and of the tokenizer together.

    Args:
      generation, config: contents of ``generation_config.json`` and ``config.json``.
      tokenizer: of transformers, or None.
    """
    ids: set[int] = set()
    text = config.get("text_config")  # of a model that looks at images
    for settings in (generation, config, text if isinstance(text, dict) else {}):
        value = settings.get("eos_token_id")
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))
