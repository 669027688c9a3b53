"""Log likelihoods of continuations, in batches of few shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from awq_jax.evaluate import LOGIT_BYTES
from awq_jax.serve.generate import SMALLEST_PROMPT, Generator, bucket, check_tokens

TOKENS = 4096  # of one forward pass, unless a batch size is given
FEW = (8, 64)  # lengths of continuations that are compiled for, before that of the whole row


class Scored(NamedTuple):
    """The log likelihood of a continuation in nats, and whether each of its tokens is the most likely one."""

    loglikelihood: float
    greedy: bool


class Scorer:
    """Scores with the packed weights as they are served.

    The head is applied only where a continuation is predicted, and every batch has one of few shapes: powers of two.

    Args:
      generator, params: see `awq_jax.serve.served_weights.ServedWeights.serving`.
      batch_size: rows of a forward pass; None: as many as make about `TOKENS` tokens.
      most: at most so many of them; None: any number.
      max_length: tokens that are read of a row, at most; None: the model's context.
    """

    def __init__(
        self,
        generator: Generator,
        params: nnx.State,
        batch_size: int | None = None,
        most: int | None = None,
        max_length: int | None = None,
    ):
        self.config, self.params, self.batch_size, self.most = generator.config, params, batch_size, most
        self.max_length = max_length or generator.config.max_length

        @jax.jit
        def score(
            params: nnx.State, tokens: jax.Array, at: jax.Array, following: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            """Of ``tokens [B, T]``, and ``following [B, C]`` the tokens at ``at``."""
            decoder = nnx.merge(generator.graphdef, params)
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            hidden, _ = decoder.hidden(tokens, positions, None)
            logits = decoder.head(jnp.take_along_axis(hidden, at[..., None], axis=1)).astype(jnp.float32)
            gold = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
            return gold - jax.nn.logsumexp(logits, axis=-1), logits.argmax(axis=-1) == following

        self.score = score

    def __call__(
        self,
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        done: Callable[[int, Scored], None] = lambda *_: None,
    ) -> list[Scored]:
        """Score continuations.

        Args:
          rows: token ids of a context, at least one, and of its continuation, at least one; contexts are cut
            on the left, so that the model reads at most ``max_length`` tokens.
          done: called with the number and the score of each row, in any order.

        Raises:
          ShapeError: on ids outside the vocabulary.
        """
        found: list[Scored | None] = [None] * len(rows)
        for batch in self.batches(rows):
            for i, scored in zip(batch, self._batch([rows[i] for i in batch]), strict=True):
                found[i] = scored
                done(i, scored)
        return [scored for scored in found if scored is not None]

    def batches(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[list[int]]:
        """Numbers of rows of one shape, longest first: what does not fit into memory is known at once."""
        shapes: dict[tuple[int, int], list[int]] = {}
        for i, (context, continuation) in enumerate(rows):
            length = min(len(context) + len(continuation) - 1, self.max_length)
            shapes.setdefault(_shape(length, min(len(continuation), length)), []).append(i)
        for (length, scored), members in sorted(shapes.items(), reverse=True):
            size = self.batch_size or max(
                1, min(TOKENS // length, LOGIT_BYTES // (4 * scored * self.config.vocab_size))
            )
            size = min(size, self.most or size)
            for first in range(0, len(members), size):
                yield members[first : first + size]

    def _batch(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        whole = [np.array([*c, *t], np.int64)[-(self.max_length + 1) :] for c, t in rows]
        counts = [min(len(t), len(w) - 1) for (_, t), w in zip(rows, whole, strict=True)]
        length, scored = _shape(max(len(w) - 1 for w in whole), max(counts))
        size = 1 << (len(rows) - 1).bit_length()  # the last batch is filled up
        size = min(size, self.batch_size) if self.batch_size and self.batch_size >= len(rows) else size
        tokens, at, following = (np.zeros((size, n), np.int32) for n in (length, scored, scored))
        for i, (row, n) in enumerate(zip(whole, counts, strict=True)):
            check_tokens(row, self.config.vocab_size, f"row {i}")
            tokens[i, : len(row) - 1] = row[:-1]
            at[i, :n], following[i, :n] = np.arange(len(row) - 1 - n, len(row) - 1), row[len(row) - n :]
        logprobs, same = jax.device_get(self.score(self.params, tokens, at, following))
        return [
            Scored(float(logprobs[i, :n].astype(np.float64).sum()), bool(same[i, :n].all()))
            for i, n in enumerate(counts)
        ]


def _shape(length: int, scored: int) -> tuple[int, int]:
    """What is compiled for: tokens read, and tokens scored of them."""
    read = bucket(length, SMALLEST_PROMPT)
    return read, next((n for n in FEW if scored <= n <= read), read)
