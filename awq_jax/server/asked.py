"""What a body asks for, whichever of the two kinds of completions it is of."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping

from awq_jax.serve.sampling import SEEDS, Sampling
from awq_jax.server.fields import Fields
from awq_jax.server.problems import Problem

MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS = 128, 16, 20


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Settings of a request that says nothing: those of the model's ``generation_config.json``, else OpenAI's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, generation: Mapping[str, object]) -> Defaults:
        """From the file's contents; values out of range are left out."""
        found = {}
        for field in dataclasses.fields(cls):
            value = generation.get(field.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                try:
                    Sampling.from_dict({field.name: value})
                except ValueError:
                    continue
                found[field.name] = value
        return cls(**found)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What both kinds have in common.

    Attributes:
      sampling: of the first choice; further ones have the seeds after its.
      most: new tokens; None for as many as there is room for.
      choices: for each prompt.
      stream: send what comes as it comes.
      usage: end a stream with the counts.
      ignore_eos: go on where the model would end.
    """

    sampling: Sampling
    most: int | None
    choices: int
    stream: bool
    usage: bool
    ignore_eos: bool

    def of_choice(self, number: int) -> Sampling:
        """How the tokens of a choice are picked."""
        return dataclasses.replace(self.sampling, seed=(self.sampling.seed + number) % SEEDS)


def read(f: Fields, defaults: Defaults, most: int | None, logprobs: int | None) -> Asked:
    """From a body.

    Args:
      most: new tokens where the body does not say.
      logprobs: how many likely tokens are asked for.

    Raises:
      Problem: naming a field that is wrong.
    """
    tokens = f.whole("max_completion_tokens", None, 0, 1 << 31)
    tokens = f.whole("max_tokens", most, 0, 1 << 31) if tokens is None else tokens
    seed = f.whole("seed", None, -(1 << 63), (1 << 63) - 1)
    seed = secrets.randbelow(SEEDS) if seed is None else seed % SEEDS
    stop = f.texts("stop", MOST_STOPS)
    top_k = f.whole("top_k", defaults.top_k, -1, 1 << 31)
    top_p = f.number("top_p", defaults.top_p, 0, 1)
    repetition = f.number("repetition_penalty", defaults.repetition_penalty, 0, 100)
    if repetition == 0:
        raise f.wrong("repetition_penalty", "above 0")
    sampling = Sampling(
        temperature=f.number("temperature", defaults.temperature, 0, 100),
        top_k=max(top_k, 0),
        top_p=max(top_p, 1e-6),  # 0 keeps the most likely token
        min_p=f.number("min_p", defaults.min_p, 0, 1),
        repetition_penalty=repetition,
        presence_penalty=f.number("presence_penalty", 0.0, -2, 2),
        frequency_penalty=f.number("frequency_penalty", 0.0, -2, 2),
        seed=seed,
        stop=stop,
        stop_ids=f.ids("stop_token_ids"),
        logit_bias=_biases(f),
        logprobs=logprobs,
    )
    options, stream = f.object("stream_options"), f.flag("stream")
    if options is not None and not stream:
        raise Problem("stream_options is for stream: true", param="stream_options")
    usage = options is not None and options.flag("include_usage")
    return Asked(sampling, tokens, f.whole("n", 1, 1, MOST_CHOICES), stream, usage, f.flag("ignore_eos"))


def _biases(f: Fields) -> tuple[tuple[int, float], ...]:
    given = f.object("logit_bias")
    if given is None:
        return ()
    found = []
    for key in given.data:
        if not key.isascii() or not key.isdigit() or len(key) > 9:
            raise f.wrong("logit_bias", "an object from token ids to numbers")
        found.append((int(key), given.number(key, 0.0, -100, 100)))
    return tuple(found)
