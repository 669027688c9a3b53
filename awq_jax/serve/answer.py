"""Prompts of token ids to texts: what `Model.generate`, `Model.answers` and the command line have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from flax import nnx

from awq_jax.convert.text import Message, TokenizerLike
from awq_jax.models.config import ModelConfig
from awq_jax.models.vision import inputs as vision
from awq_jax.serve import prompts
from awq_jax.serve.detokenize import Detokenizer
from awq_jax.serve.generate import Generator, Past, TokenLogprobs
from awq_jax.serve.sampling import Sampling

Prompts = str | Sequence[Message] | Sequence[prompts.Prompt] | Mapping[str, Any]
Stream = Callable[[str], None] | Callable[[str, int], None]


@dataclasses.dataclass(frozen=True)
class Answer:
    """The continuation of one prompt.

    Attributes:
      text: the new text.
      finish_reason: ``"stop"``: at an end of the model's, a stop string or a stop id; ``"length"``: at
        ``max_new_tokens``, or because the model's context is full.
      prompt_tokens: ids of the prompt.
      completion_tokens: ids that the model has made, those included that ended the answer and are no part of the text.
      seed: of its random draws.
      prefill_tokens_per_second: of the batch: tokens of all prompts by the seconds to the first new one.
      decode_tokens_per_second: of this answer, after its first token; None if it has no second one.
        Neither counts the time for compiling.
      ids: the new token ids; an id that ended the answer is not among them.
      logprobs: of each of ``ids``; None unless asked for.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    seed: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


def rows_of(
    config: ModelConfig, tokenizer: TokenizerLike | None, prompt: Prompts, chat: bool
) -> tuple[list[list[int]], dict[str, np.ndarray] | None]:
    """Token ids of each prompt, and the images that they stand for; see `awq_jax.serve.model.Model.generate`.

    Raises:
      ConfigError: see `awq_jax.serve.prompts.encode` and `awq_jax.models.vision.inputs.inputs`.
      ShapeError: see the latter.
    """
    if not isinstance(prompt, Mapping):
        return prompts.encode(tokenizer, prompt, chat), None
    images, lengths = vision.inputs(config, prompt)
    return [row[:n].tolist() for row, n in zip(images.pop("input_ids"), lengths, strict=True)], images


def answer_rows(
    generator: Generator,
    params: nnx.State,
    tokenizer: TokenizerLike,
    rows: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    max_new_tokens: int,
    eos: Sequence[int],
    stream: Stream | None = None,
    images: Mapping[str, np.ndarray] | None = None,
    past: Past | None = None,
) -> list[Answer]:
    """Continue rows of token ids and decode what comes.

    Args:
      generator, params: see `awq_jax.serve.served_weights.ServedWeights.serving`.
      tokenizer: ours or of transformers.
      rows, sampling, max_new_tokens, eos, images, past: see `Generator.continuations`.
      stream: see `awq_jax.serve.model.Model.generate`.

    Raises:
      ConfigError, ShapeError: see `Generator.continuations`.
    """
    each = [sampling] * len(rows) if isinstance(sampling, Sampling) else list(sampling)
    texts = [Detokenizer(tokenizer, ids, s.stop) for ids, s in zip(rows, each, strict=True)]

    def emit(row: int, piece: str) -> None:
        if stream is not None and piece:
            stream(piece, *([row] if len(rows) > 1 else []))

    def on_token(row: int, token: int) -> bool:
        emit(row, texts[row].push(token))
        return texts[row].stopped

    found = generator.continuations(
        params,
        rows,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos=eos,
        on_token=on_token,
        images=images,
        past=past,
    )
    for row, text in enumerate(texts):
        emit(row, text.finish())
    prompt = sum(map(len, rows))
    return [
        Answer(
            text.text,
            "stop" if text.stopped else made.finish_reason,  # one that only the last of the text completed
            len(ids),
            made.made,
            int(s.seed),
            prompt / max(made.prefill_seconds, 1e-9),
            (made.made - 1) / max(made.decode_seconds, 1e-9) if made.made > 1 else None,
            tuple(made.ids),
            None if made.logprobs is None else tuple(made.logprobs),
        )
        for ids, s, text, made in zip(rows, each, texts, found, strict=True)
    ]
