"""Prompts and conversations as token ids, and the ids that end an answer."""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from awq_jax.convert.config_json import HfConfig
from awq_jax.convert.text import Message, TokenizerLike, ids_of
from awq_jax.errors import ConfigError

Prompt = str | Sequence[int] | Sequence[Message]  # a text, token ids, or (with ``chat``) a conversation


def encode(
    tokenizer: TokenizerLike | None, prompt: str | Sequence[Message] | Sequence[Prompt], chat: bool
) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
      tokenizer: ours or of transformers; None if the checkpoint has none.
      prompt: a text, token ids, or a list of such; with ``chat`` a list of ``{"role", "content"}`` is one
        conversation, and a text is a user's message.
      chat: wrap the prompts in the tokenizer's chat template.

    Raises:
      ConfigError: there is no tokenizer or no chat template.
    """
    tokenizer = needed(tokenizer)
    if isinstance(prompt, str) or (len(prompt) and all(isinstance(p, int | np.integer) for p in prompt)):
        prompt = cast(Sequence[Prompt], [prompt])
    if unlike := next((p for p in prompt if not isinstance(p, str | Sequence | np.ndarray | Mapping)), None):
        raise ConfigError(f"a prompt is {unlike!r}: pass a text, token ids, or a list of those")
    if not chat:
        return [ids_of(tokenizer, [p])[0] if isinstance(p, str) else list(cast(Sequence[int], p)) for p in prompt]
    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template; generate without chat")
    one = bool(prompt) and isinstance(prompt[0], Mapping)
    talks = [prompt] if one else [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompt]
    conversations = cast(Sequence[Sequence[Message]], talks)
    return [tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False) for t in conversations]


def needed(tokenizer: TokenizerLike | None) -> TokenizerLike:
    """The tokenizer, where there must be one (`ConfigError`)."""
    if tokenizer is None:
        raise ConfigError("the checkpoint has no tokenizer; put tokenizer.json beside its weights")
    return tokenizer


def eos_ids(generation: HfConfig, config: HfConfig, tokenizer: TokenizerLike | None) -> tuple[int, ...]:
    """Ids that end an answer: those of both files and of the tokenizer together.

    Args:
      generation, config: contents of ``generation_config.json`` and ``config.json``.
      tokenizer: ours or of transformers, or None.
    """
    ids: set[int] = set()
    text = config.get("text_config")  # of a model that looks at images
    for settings in (generation, config, text if isinstance(text, dict) else {}):
        value = settings.get("eos_token_id")
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))
