"""How the tokens of slots are drawn: the settings of all slots on the host, and three programs.

`awq_jax.serve.sampling.draw` leaves what no row uses out of its program. An engine cannot compile for each mixture of
settings, so there are three: ``greedy``; ``drawn``, with a temperature; and ``all``, with everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.errors import ConfigError
from awq_jax.serve.sampling import Drawn, Draws, Sampling, draw

Kind = Literal["greedy", "drawn", "all"]
KINDS: tuple[Kind, ...] = ("greedy", "drawn", "all")
MOST_BIASES = 512
LIKELY = 20  # log probabilities that are reported at most, as in the OpenAI API


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """Which tokens the slots' prompts have, bool ``[slots, V]``, and how often their answers have each, int32."""

    prompt: jax.Array
    counts: jax.Array

    @classmethod
    def empty(cls, slots: int, vocabulary: int) -> Seen:
        """Of slots that have seen nothing."""
        return cls(jnp.zeros((slots, vocabulary), bool), jnp.zeros((slots, vocabulary), jnp.int32))


def kind_of(s: Sampling, constrained: bool = False) -> Kind:
    """The least of the programs that does what a request asks for."""
    penalties = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1, 0, 0)
    if constrained or penalties or s.logit_bias or s.logprobs is not None:
        return "all"
    if s.temperature == 0:
        return "greedy"
    return "drawn" if (s.top_k, s.top_p, s.min_p) == (0, 1, 0) else "all"


def packed_width(vocabulary: int) -> int:
    """Bytes of one bit for each token."""
    return -(-vocabulary // 8)


class Settings:
    """What `Sampling` has, of all slots: arrays ``[slots]``.

    Args:
      slots: how many.
      vocabulary: how many tokens there are.

    Attributes:
      allowed: uint8 ``[slots, V / 8]``: a bit for each token that the row may say next, lowest first.
    """

    def __init__(self, slots: int, vocabulary: int):
        self.vocabulary = vocabulary
        self._columns = {
            name: np.zeros(slots, np.float32)
            for name in ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
        }
        self._columns |= {"seed": np.zeros(slots, np.uint32), "stream": np.zeros(slots, np.uint32)}
        self._columns |= {"made": np.zeros(slots, np.int32), "top_k": np.zeros(slots, np.int32)}
        self._columns |= {
            "bias_ids": np.full((slots, MOST_BIASES), vocabulary, np.int32),
            "bias": np.zeros((slots, MOST_BIASES), np.float32),
            "allowed": np.full((slots, packed_width(vocabulary)), 255, np.uint8),
        }
        for slot in range(slots):
            self.put(slot, Sampling())

    @property
    def allowed(self) -> np.ndarray:
        return self._columns["allowed"]

    def put(self, slot: int, s: Sampling) -> None:
        """A slot has a new owner."""
        values = {
            "temperature": s.temperature, "top_p": s.top_p, "min_p": s.min_p, "repetition": s.repetition_penalty,
            "presence": s.presence_penalty, "frequency": s.frequency_penalty, "seed": s.seed, "made": 0,
            "top_k": min(s.top_k, self.vocabulary),
        }  # fmt: skip
        for name, value in values.items():
            self._columns[name][slot] = value
        self._columns["bias_ids"][slot] = self.vocabulary
        for i, (token, value) in enumerate(s.logit_bias):
            self._columns["bias_ids"][slot, i], self._columns["bias"][slot, i] = token, value
        self.allowed[slot] = 255

    def count(self, slot: int) -> None:
        """A token was drawn."""
        self._columns["made"][slot] += 1

    def of(self, kind: Kind, first: int, rows: int, width: int) -> Draws:
        """What the program of this kind takes for ``rows`` slots from ``first``, and more up to ``width``."""
        names = {"greedy": (), "drawn": ("seed", "stream", "made", "temperature"), "all": tuple(self._columns)}[kind]
        # Copies: the arrays change while the program may still read.
        given = {name: np.resize(self._columns[name][first : first + rows], (width, *self._columns[name].shape[1:]))
                 for name in names}  # fmt: skip
        return Draws(**given, logprobs=min(LIKELY, self.vocabulary) if kind == "all" else None)


def check(s: Sampling, vocabulary: int) -> None:
    """Refuse what the programs have no room for.

    Raises:
      ConfigError: naming the setting.
    """
    s.check(vocabulary)
    if len(s.logit_bias) > MOST_BIASES:
        raise ConfigError(f"logit_bias has {len(s.logit_bias)} tokens; at most {MOST_BIASES} can be given")
    if s.logprobs is not None and s.logprobs > LIKELY:
        raise ConfigError(f"logprobs is {s.logprobs}; at most {LIKELY} can be given")


def drawn(logits: jax.Array, draws: Draws) -> Drawn:
    """The next tokens of rows without a memory."""
    return draw(logits, draws)[0]


def drawn_seen(logits: jax.Array, seen: Seen, first: jax.Array, rows: jax.Array, draws: Draws) -> tuple[Drawn, Seen]:
    """The next tokens of ``rows`` slots from ``first``, which are counted."""
    at = first + jnp.arange(logits.shape[0])  # what is more than the window's is drawn, too, and not counted
    prompt, counts = (a.at[at].get(mode="clip") for a in (seen.prompt, seen.counts))
    said, after = draw(logits, dataclasses.replace(draws, prompt=prompt, counts=counts))
    kept = jnp.where(jnp.arange(logits.shape[0]) < rows, at, len(seen.counts))
    return said, Seen(seen.prompt, seen.counts.at[kept].set(after.counts, mode="drop"))


def begun(seen: Seen, slot: jax.Array, prompt: jax.Array) -> Seen:
    """With a new prompt in a slot: uint8 ``[V / 8]``, a bit for each token that it has."""
    bits = jnp.unpackbits(prompt, bitorder="little")[: seen.prompt.shape[1]].astype(bool)
    return Seen(seen.prompt.at[slot].set(bits), seen.counts.at[slot].set(0))


def tokens_of(prompt: Sequence[int], vocabulary: int) -> np.ndarray:
    """A bit for each token of a vocabulary, set where a prompt has it: uint8 ``[V / 8]``."""
    bits = np.zeros(packed_width(vocabulary) * 8, np.uint8)
    ids = np.asarray(prompt, np.int64)
    bits[ids[(ids >= 0) & (ids < vocabulary)]] = 1
    return np.packbits(bits, bitorder="little")
