"""Prompts of token ids to texts: what `Model.generate`, `Model.answers` and the command line have in common."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from awq_jax.adapters.attach import Attached
from awq_jax.convert.source import Source
from awq_jax.convert.text import Message, TokenizerLike
from awq_jax.errors import ConfigError
from awq_jax.models.config import ModelConfig
from awq_jax.models.vision import inputs as vision
from awq_jax.serve import prompts
from awq_jax.serve.detokenize import Detokenizer
from awq_jax.serve.generate import Generator, Past, TokenLogprobs
from awq_jax.serve.sampling import Sampling, of_rows
from awq_jax.serve.served_weights import ServedWeights

Prompts = str | Sequence[Message] | Sequence[prompts.Prompt] | Mapping[str, Any]
Stream = Callable[[str], None] | Callable[[str, int], None]


class Default(enum.Enum):
    """Stands for the adapter that a model was loaded with, where None says: none."""

    DEFAULT = enum.auto()


DEFAULT = Default.DEFAULT
Adapters = str | None | Sequence[str | None] | Default


@dataclasses.dataclass(frozen=True)
class Scored:
    """A model with an adapter, as `awq_jax.evaluate` takes it.

    Attributes:
      params: with the adapter's factors beside the weights.
      apply, forward: logits of tokens; see `awq_jax.serve.model.Model`.
      config: architecture.
      tokenizer: the model's.
    """

    params: nnx.State
    apply: Callable[..., jax.Array]
    forward: Callable[..., jax.Array]
    config: ModelConfig
    tokenizer: TokenizerLike | None


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


class Answering:
    """What `awq_jax.serve.model.Model` is made of to generate: see there for the attributes."""

    config: ModelConfig
    hf_config: dict[str, Any]
    tokenizer: TokenizerLike | None
    source: Source
    _weights: ServedWeights
    _adapters: Attached | None
    _always: str | None

    def generate(
        self,
        prompt: Prompts,
        *,
        max_new_tokens: int = 128,
        stream: Stream | None = None,
        chat: bool = False,
        adapter: Adapters = DEFAULT,
        **settings: Any,
    ) -> list[str]:
        """Continue one or several prompts as one batch.

        Args:
          prompt: a text, or a list of texts (or of token id lists). With ``chat``, a text is a user's
            message, and a list of ``{"role", "content"}`` dicts is one conversation. What a
            processor returned for texts and images (see `inputs`) is taken as it is.
          max_new_tokens: at most this many tokens per answer.
          stream: called with each piece of text, in whole characters, as soon as it is certain; with
            several prompts, with the piece and the prompt's number.
          chat: wrap the prompts in the tokenizer's chat template.
          adapter: the name of one that the model was loaded with, or None for none; a list has one for each prompt.
            Default: one that was given to `awq_jax.load` without a name, else none.
          **settings: fields of `awq_jax.serve.sampling.Sampling`: ``temperature`` (the default is 0: greedy),
            ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``, ``presence_penalty``, ``frequency_penalty``,
            ``stop``, ``stop_ids``, ``logit_bias``, ``logprobs``, and ``seed``, which may be a list with a seed for each
            prompt: an answer with a seed of its own is the same in any batch.

        Returns:
          The new text of each prompt. `answers` says more of each.

        Raises:
          ConfigError: without a tokenizer or chat template, on a value out of range, or on an unknown adapter.
          ShapeError: a prompt is empty or too long.
        """
        given: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stream": stream, "chat": chat, "adapter": adapter}
        found = self.answers(prompt, **given, **settings)
        return [one.text for one in found]

    def answers(
        self,
        prompt: Prompts,
        *,
        max_new_tokens: int = 128,
        stream: Stream | None = None,
        chat: bool = False,
        adapter: Adapters = DEFAULT,
        past: Past | None = None,
        **settings: Any,
    ) -> list[Answer]:
        """As `generate`: texts with why they end, counts of tokens, speed, and log probabilities if asked for.

        Args:
          prompt, max_new_tokens, stream, chat, adapter, settings: as for `generate`.
          past: of a single prompt; passed with every turn of a conversation, so that only what is new is read.

        Raises:
          ConfigError, ShapeError: as for `generate`.
        """
        rows, images = rows_of(self.config, self.tokenizer, prompt, chat)
        sampling, tokenizer = of_rows(len(rows), settings), prompts.needed(self.tokenizer)
        self.adapters_of(adapter, len(rows))  # refused before weights are converted
        generator, params = self._weights.serving(None if past is not None else max_new_tokens)
        params = self._beside(generator, params, adapter, len(rows))
        return answer_rows(
            generator, params, tokenizer, rows, sampling, max_new_tokens, self.eos_ids(), stream, images, past
        )

    def adapters_of(self, adapter: Adapters, rows: int) -> list[str | None]:
        """The adapter of each of ``rows`` prompts; see `generate`.

        Raises:
          ConfigError: one is not there, or their number is not that of the prompts.
        """
        if adapter is DEFAULT:
            adapter = self._always
        names: list[str | None] = [adapter] * rows if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != rows:
            raise ConfigError(f"{len(names)} adapters for {rows} prompts: give one for each, or one for all")
        there = () if self._adapters is None else self._adapters.names
        for name in names:
            if name is not None and name not in there:
                known = ", ".join(map(repr, there)) or "none"
                raise ConfigError(f"there is no adapter {name!r}; the model was loaded with {known}")
        return names

    def _beside(self, generator: Generator, params: nnx.State, adapter: Adapters, rows: int) -> nnx.State:
        """``params`` of a generator with the adapters of these rows beside them."""
        names = self.adapters_of(adapter, rows)
        return params if self._adapters is None else self._adapters.each(params, names, generator.config)

    def serving(self) -> tuple[Generator, nnx.State, tuple[str, ...]]:
        """The programs and the parameters, in the form in which they generate, for many requests; and the names of the
        adapters that may be chosen for each of them, by whose places `awq_jax.kernels.adapted.of_rows` takes them. None
        may be where one is always used.

        Raises:
          ConfigError: one has to be alone in a batch.
        """
        generator, params = self._weights.serving()
        if self._adapters is not None and self._always is None:
            return generator, self._adapters.all(params, generator.config), self._adapters.names
        return generator, self._beside(generator, params, DEFAULT, 1), ()

    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: generation config, model config and tokenizer together."""
        return prompts.eos_ids(self.source.generation_config, self.hf_config, self.tokenizer)
