"""Choosing the next token from logits: the settings of a request, and what they do to the logits of a batch.

In this order, which is that of transformers' processors (those that vLLM and the OpenAI API have besides stand where
vLLM has them): logit bias; the penalties of repetition, presence and frequency; temperature; top_k; top_p; min_p.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.errors import ConfigError

SEEDS = 1 << 32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of one row are picked, and what ends it.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: of those, keep the most likely ones that together reach this probability
        (arXiv 1904.09751); 1 keeps all.
      min_p: of those, keep the ones that are at least this times as likely as the most likely one
        (arXiv 2407.01082); 0 keeps all.
      repetition_penalty: positive logits of tokens that the prompt or the answer has are divided by it, negative
        ones multiplied (arXiv 1909.05858, as transformers has it); 1 changes nothing.
      presence_penalty: is subtracted from the logits of tokens that the answer has (OpenAI API); -2 ... 2.
      frequency_penalty: is subtracted once for each time that the answer has the token; -2 ... 2.
      seed: of the random draws, 0 to 2**32 - 1.
      stop: strings that end the answer; they are not part of it. Given as one string or several.
      stop_ids: token ids that end it, besides those that end an answer of the model.
      logit_bias: added to the logits of tokens, by id, -100 ... 100 each; given as a mapping.
      logprobs: None; or report the log probability of each new token, and those of this many most likely ones, as the
        model gives them: before bias, penalties and temperature.

    Raises:
      ConfigError: on a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, lambda v: v >= 0, "0 (greedy) or a positive number")
        _check("top_k", self.top_k, lambda v: v >= 0, "0 (off) or a positive integer", whole=True)
        _check("top_p", self.top_p, lambda v: 0 < v <= 1, "above 0 and at most 1 (off)")
        _check("min_p", self.min_p, lambda v: 0 <= v <= 1, "0 (off) to 1")
        _check("repetition_penalty", self.repetition_penalty, lambda v: v > 0, "a positive number (1: off)")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), lambda v: -2 <= v <= 2, "-2 to 2 (0: off)")
        _check("seed", self.seed, lambda v: 0 <= v < SEEDS, f"a whole number from 0 to {SEEDS - 1}", whole=True)
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, lambda v: v >= 0, "None (off) or how many, 0 or more", whole=True)
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(isinstance(s, str) for s in stops):
            raise ConfigError(f"stop must be a string or several; got {self.stop!r:.200}")
        if "" in stops:
            raise ConfigError("a stop string is empty")
        ids = (self.stop_ids,) if isinstance(self.stop_ids, int) else tuple(self.stop_ids or ())
        for i in ids:
            _check("stop_ids", i, lambda v: v >= 0, "token ids", whole=True)
        bias = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias or ()
        object.__setattr__(self, "stop", stops)
        object.__setattr__(self, "stop_ids", tuple(map(int, ids)))
        object.__setattr__(self, "logit_bias", tuple(sorted(_biases(bias))))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sampling:
        """From settings by name.

        Raises:
          ConfigError: on an unknown name, or a value out of range.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(data) - set(known)):
            raise ConfigError(f"unknown settings {unknown}; known are {', '.join(known)}")
        return cls(**data)

    def check(self, vocabulary: int) -> None:
        """Refuse ids that a vocabulary of this size has not.

        Raises:
          ConfigError: naming the setting and the id.
        """
        for name, ids in (("stop_ids", self.stop_ids), ("logit_bias", [i for i, _ in self.logit_bias])):
            if outside := [i for i in ids if i >= vocabulary]:
                raise ConfigError(f"{name} names token {outside[0]}; the vocabulary has {vocabulary}")
        if self.logprobs is not None and self.logprobs > vocabulary:
            raise ConfigError(f"logprobs is {self.logprobs}; the vocabulary has {vocabulary} tokens")


def of_rows(rows: int, settings: Mapping[str, Any]) -> Sampling | list[Sampling]:
    """Settings by name for a batch: one for all rows, or one for each if ``seed`` is a sequence.

    Raises:
      ConfigError: on an unknown name, a value out of range, or another number of seeds than rows.
    """
    seeds = settings.get("seed", 0)
    if not isinstance(seeds, Sequence | np.ndarray) or isinstance(seeds, str):
        return Sampling.from_dict(settings)
    if len(seeds) != rows:
        raise ConfigError(f"{len(seeds)} seeds for {rows} prompts; pass one seed, or one for each prompt")
    return [Sampling.from_dict({**settings, "seed": seed}) for seed in seeds]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """How the rows of a batch draw, and what they have drawn: arrays ``[B]`` of what `Sampling` has for one row.

    What no row uses is None, so that it is not in the compiled program; the numbers themselves are arguments of it.

    Attributes:
      seed, stream: uint32: a row's draws are those of its stream of its seed; None if all rows are greedy.
      made: int32: tokens that the row has drawn.
      temperature, top_k, top_p, min_p, repetition, presence, frequency: float32 (``top_k``: int32).
      bias_ids, bias: int32 and float32 ``[B, n]``; where a row has fewer biases, ids are the vocabulary's size.
      prompt: bool ``[B, V]``: tokens that the row's prompt has.
      counts: int32 ``[B, V]``: how often the answer has each token.
      allowed: uint8 ``[B, ceil(V / 8)]``: a bit for each token, lowest first; one whose bit is 0 is not drawn.
      logprobs: see `Sampling`; of all rows, the largest.
    """

    seed: jax.Array | np.ndarray | None = None
    stream: jax.Array | np.ndarray | None = None
    made: jax.Array | np.ndarray | None = None
    temperature: jax.Array | np.ndarray | None = None
    top_k: jax.Array | np.ndarray | None = None
    top_p: jax.Array | np.ndarray | None = None
    min_p: jax.Array | np.ndarray | None = None
    repetition: jax.Array | np.ndarray | None = None
    presence: jax.Array | np.ndarray | None = None
    frequency: jax.Array | np.ndarray | None = None
    bias_ids: jax.Array | np.ndarray | None = None
    bias: jax.Array | np.ndarray | None = None
    prompt: jax.Array | np.ndarray | None = None
    counts: jax.Array | np.ndarray | None = None
    allowed: jax.Array | np.ndarray | None = None
    logprobs: int | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """The next token of each row.

    Attributes:
      ids: int32 ``[B]``.
      logprobs: float32 ``[B]``, of ``ids``, before bias, penalties and temperature; None if not asked for.
      likely: int32 ``[B, n]``: the most likely tokens, falling; None if not asked for.
      likely_logprobs: float32 ``[B, n]``.
    """

    ids: jax.Array
    logprobs: jax.Array | None = None
    likely: jax.Array | None = None
    likely_logprobs: jax.Array | None = None


def begin(sampling: Sampling | Sequence[Sampling], prompts: Sequence[Sequence[int]], vocabulary: int) -> Draws:
    """`Draws` of rows that have drawn nothing.

    Args:
      sampling: of each row; or of all, whose streams are then those of one seed.
      prompts: token ids of each row.
      vocabulary: how many tokens there are.

    Raises:
      ConfigError: there are not as many settings as rows, or they name ids that there are not.
    """
    shared = isinstance(sampling, Sampling)
    rows = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if len(rows) != len(prompts):
        raise ConfigError(f"{len(rows)} settings of sampling for {len(prompts)} prompts")
    for row in set(rows):
        row.check(vocabulary)

    def column(name: str, dtype: type = np.float32) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], dtype)

    fields: dict[str, Any] = {"logprobs": max((r.logprobs for r in rows if r.logprobs is not None), default=None)}
    if any(r.temperature > 0 for r in rows):
        fields["seed"], fields["temperature"] = column("seed", np.uint32), column("temperature")
        fields["stream"] = np.arange(len(rows), dtype=np.uint32) * np.uint32(shared)
        fields["made"] = np.zeros(len(rows), np.int32)
        if any((r.top_k, r.top_p, r.min_p) != (0, 1, 0) for r in rows):
            # A k beyond int32 keeps all, as any that is beyond the vocabulary.
            fields["top_k"] = np.array([min(r.top_k, vocabulary) for r in rows], np.int32)
            fields |= {"top_p": column("top_p"), "min_p": column("min_p")}
    if any(r.repetition_penalty != 1 for r in rows):
        fields["repetition"], fields["prompt"] = column("repetition_penalty"), np.zeros((len(rows), vocabulary), bool)
        for seen, ids in zip(fields["prompt"], map(np.asarray, prompts), strict=True):
            seen[ids[(ids >= 0) & (ids < vocabulary)]] = True  # an image's token may lie outside
    if any(r.presence_penalty or r.frequency_penalty for r in rows):
        fields |= {"presence": column("presence_penalty"), "frequency": column("frequency_penalty")}
    if "repetition" in fields or "presence" in fields:
        fields["counts"] = np.zeros((len(rows), vocabulary), np.int32)
    if most := max(len(r.logit_bias) for r in rows) if rows else 0:
        width = 1 << (most - 1).bit_length()  # few programs
        fields["bias_ids"] = np.full((len(rows), width), vocabulary, np.int32)
        fields["bias"] = np.zeros((len(rows), width), np.float32)
        for i, row in enumerate(rows):
            for j, (token, value) in enumerate(row.logit_bias):
                fields["bias_ids"][i, j], fields["bias"][i, j] = token, value
    return Draws(**fields)


def draw(logits: jax.Array, draws: Draws) -> tuple[Drawn, Draws]:
    """One token per row; a row's does not depend on its neighbours.

    Args:
      logits: float32 ``[B, V]``.
      draws: how, and what was drawn before.
    """
    rows = jnp.arange(logits.shape[0])
    changed = masked(penalized(biased(logits, draws), draws), draws)
    ids = jnp.argmax(changed, axis=-1).astype(jnp.int32)
    if draws.temperature is not None:
        assert draws.seed is not None
        assert draws.stream is not None
        assert draws.made is not None
        likely = kept(tempered(changed, draws), draws)
        keys = jax.vmap(_key)(jnp.asarray(draws.seed), jnp.asarray(draws.made), jnp.asarray(draws.stream))
        drawn = jax.vmap(jax.random.categorical)(keys, likely).astype(jnp.int32)
        ids = jnp.where(jnp.asarray(draws.temperature) == 0, ids, drawn)
        draws = dataclasses.replace(draws, made=draws.made + 1)
    if draws.counts is not None:
        draws = dataclasses.replace(draws, counts=jnp.asarray(draws.counts).at[rows, ids].add(1))
    if draws.logprobs is None:
        return Drawn(ids), draws
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    most, likely_ids = jax.lax.top_k(logprobs, draws.logprobs)
    return Drawn(ids, logprobs[rows, ids], likely_ids, most), draws


def biased(logits: jax.Array, draws: Draws) -> jax.Array:
    """``logits [B, V]`` with the biases added."""
    if draws.bias is None:
        return logits
    return logits.at[jnp.arange(logits.shape[0])[:, None], draws.bias_ids].add(draws.bias, mode="drop")


def penalized(logits: jax.Array, draws: Draws) -> jax.Array:
    """``logits [B, V]`` after the penalties of repetition, then of presence and frequency."""
    if draws.counts is None:
        return logits
    said = jnp.asarray(draws.counts) > 0
    if draws.repetition is not None:
        by = _of_rows(draws.repetition)
        logits = jnp.where(said | jnp.asarray(draws.prompt), jnp.where(logits < 0, logits * by, logits / by), logits)
    if draws.presence is not None:
        logits = logits - _of_rows(draws.presence) * said - _of_rows(draws.frequency) * draws.counts
    return logits


def masked(logits: jax.Array, draws: Draws) -> jax.Array:
    """``logits [B, V]`` with -inf for tokens that are not allowed."""
    if draws.allowed is None:
        return logits
    bits = jnp.unpackbits(jnp.asarray(draws.allowed), axis=-1, bitorder="little")[:, : logits.shape[-1]]
    return jnp.where(bits != 0, logits, -jnp.inf)


def tempered(logits: jax.Array, draws: Draws) -> jax.Array:
    """``logits [B, V]``, less their largest, divided by the temperature; as they are where that is 0."""
    t = _of_rows(draws.temperature)
    # The largest is 0 then, so that a tiny temperature makes -inf of the others, and nothing of the largest.
    return (logits - logits.max(axis=-1, keepdims=True)) / jnp.where(t == 0, 1.0, t)


def kept(logits: jax.Array, draws: Draws) -> jax.Array:
    """``logits [B, V]`` with -inf for what top_k, then top_p, then min_p exclude; equal logits stay together."""
    if draws.top_k is None:
        return logits
    top_k, top_p, min_p = (_of_rows(a) for a in (draws.top_k, draws.top_p, draws.min_p))
    falling = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    falling = jnp.where((top_k == 0) | (rank < top_k), falling, -jnp.inf)
    mass = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1)
    before = jnp.concatenate([jnp.zeros_like(mass[:, :1]), mass[:, :-1]], axis=-1)
    # Rounding may leave the sum of all below 1, or reach it early: 1 is off.
    reached = (before >= top_p) & (top_p < 1) | (falling == -jnp.inf)
    least = jnp.min(jnp.where(reached, jnp.inf, falling), axis=-1, keepdims=True)
    least = jnp.maximum(least, falling[:, :1] + jnp.log(min_p))
    return jnp.where(logits >= least, logits, -jnp.inf)


def _of_rows(values: jax.Array | np.ndarray | None) -> jax.Array:
    """``[B] -> [B, 1]``."""
    return jnp.asarray(values)[:, None]


def _key(seed: jax.Array, made: jax.Array, stream: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), made), stream)


def _check(name: str, value: Any, fits: Any, must: str, whole: bool = False) -> None:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not fits(value) or (whole and int(value) != value):
        raise ConfigError(f"{name} must be {must}; got {value!r:.200}")


def _biases(pairs: Any) -> list[tuple[int, float]]:
    found = []
    try:
        for token, value in pairs:
            whole = int(token)  # JSON's keys are strings
            if whole != float(token) or whole < 0:
                raise ValueError
            _check(f"logit_bias of token {whole}", value, lambda v: -100 <= v <= 100, "-100 to 100")
            found.append((whole, float(value)))
    except (TypeError, ValueError) as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"logit_bias maps token ids to numbers; got {pairs!r:.200}") from None
    return found
