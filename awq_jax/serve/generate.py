"""Batched generation with a key/value cache: one compiled prefill per length bucket, one compiled step.

Prompts are padded on the right, and every row keeps its own position: slot s of the cache holds
position s, so causality alone hides padding and no attention mask is needed.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from awq_jax.errors import ConfigError, ShapeError
from awq_jax.models.config import ModelConfig
from awq_jax.models.layers.cache import Cache, KeyValues
from awq_jax.models.vision.inputs import of_images
from awq_jax.placement import Placement
from awq_jax.serve import alike_layers, layer_programs
from awq_jax.serve.sampling import Drawn, Draws, Sampling, begin, draw

log = logging.getLogger(__name__)

SMALLEST_PROMPT, SMALLEST_CACHE = 16, 64


class TokenLogprobs(NamedTuple):
    """Of one new token, as the model gives them (see `awq_jax.serve.sampling.Sampling`)."""

    token: int
    logprob: float
    likely: tuple[tuple[int, float], ...]
    """The most likely tokens and their log probabilities, falling."""


@dataclasses.dataclass
class Continuation:
    """What one row became.

    Attributes:
      ids: the new tokens; one that ended the row is not among them.
      finish_reason: ``"stop"``: at an end of the model's, a stop id, or because ``on_token`` said so;
        ``"length"``: at the limit.
      made: tokens that the model has made, the one that ended the row included.
      prefill_seconds: until the first new token of the batch, without compilation.
      decode_seconds: from there to this row's last, without compilation.
      logprobs: of each of ``ids``; None if not asked for.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "length"
    made: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    logprobs: list[TokenLogprobs] | None = None


@dataclasses.dataclass
class Past:
    """The tokens of a row that the model has read, and what it keeps of them; empty at first.

    A conversation passes the same one with every turn, so that only what is new is read.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    cache: Cache | None = None

    def take(self, prompt: Sequence[int]) -> tuple[int, Cache | None]:
        """How many tokens of a prompt are read already, and their cache, which is the caller's from here on."""
        pairs = zip(self.ids, prompt[:-1], strict=False)  # the last token is read again, for its logits
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.ids), len(prompt) - 1))
        cache, self.ids, self.cache = self.cache, [], None
        return (same, cache) if same and cache is not None else (0, None)


class Generator:
    """The compiled programs of one model. Build it once: it holds the compilation cache.

    Args:
      graphdef: the decoder's static part (see `awq_jax.models.weights.params.abstract`).
      config: its architecture.
      place: the mesh over which its parameters are spread, or None.
      options: XLA's, for the programs that generate (see `jax.jit`).
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        config: ModelConfig,
        place: Placement | None = None,
        options: Mapping[str, str] | None = None,
    ):
        self.graphdef, self.config, self.place = graphdef, config, place
        self.options = xla = dict(options) if options else None
        self.by_layer = layer_programs.LayerPrograms(graphdef, config)
        self._whole = jax.jit(lambda params, input_ids, **images: nnx.merge(graphdef, params)(input_ids, **images))
        self.prefill = jax.jit(self._prefill, static_argnames=("slots",), compiler_options=xla)
        self.extend = jax.jit(self._extend, donate_argnames=("cache",), compiler_options=xla)
        self.step = jax.jit(self._step, donate_argnames=("cache", "draws"), compiler_options=xla)
        self.programs: dict[Any, jax.stages.Compiled] = {}

    @property
    def reads_by_layer(self) -> bool:
        """Whether prompts are read by `awq_jax.serve.layer_programs`: on a CPU, whose products take far longer than
        calling them."""
        return self.place is None and jax.default_backend() == "cpu"

    def forward(self, params: nnx.State, input_ids: ArrayLike, **images: ArrayLike) -> jax.Array:
        """Logits float32 ``[B, T, vocab]`` of every position; see `awq_jax.models.decoder.Decoder`."""
        if not self.reads_by_layer:
            return self._whole(params, input_ids, **images)
        return self.by_layer.logits(params, np.asarray(input_ids), images)

    def _prefill(
        self,
        params: nnx.State,
        tokens: jax.Array,
        lengths: jax.Array,
        draws: Draws,
        images: Mapping[str, jax.Array] | None = None,
        *,
        slots: int,
    ) -> tuple[Drawn, Draws, Cache]:
        """First new tokens of right-padded ``tokens [B, P]``, and the cache with ``slots`` slots."""
        decoder = nnx.merge(self.graphdef, params)
        rows, width = tokens.shape
        positions = jnp.minimum(jnp.arange(width), lengths[:, None] - 1)
        hidden, cache = decoder.hidden(tokens, positions, None, images, alike_layers.call)
        return self._drawn(decoder.head(hidden[jnp.arange(rows), lengths - 1]), draws, cache.grown(slots))

    def _extend(
        self, params: nnx.State, cache: Cache, tokens: jax.Array, lengths: jax.Array, draws: Draws, start: jax.Array
    ) -> tuple[Drawn, Draws, Cache]:
        """As `_prefill`, for prompts of which the first ``start [B]`` tokens are in the cache: ``tokens`` and
        ``lengths`` are of the rest, for which the cache has slots, padding included."""
        decoder = nnx.merge(self.graphdef, params)
        rows, width = tokens.shape
        positions = start[:, None] + jnp.minimum(jnp.arange(width), lengths[:, None] - 1)
        hidden, cache = decoder.hidden(tokens, positions, cache, None, alike_layers.call)
        return self._drawn(decoder.head(hidden[jnp.arange(rows), lengths - 1]), draws, cache)

    def _step(
        self, params: nnx.State, cache: Cache, draws: Draws, token: jax.Array, position: jax.Array
    ) -> tuple[Drawn, Draws, Cache]:
        """The tokens after ``token [B]``, which stands at ``position [B]``."""
        decoder = nnx.merge(self.graphdef, params)
        hidden, cache = decoder.hidden(token[:, None], position[:, None], cache, None, alike_layers.call)
        return self._drawn(decoder.head(hidden[:, 0]), draws, cache)

    def _drawn(self, logits: jax.Array, draws: Draws, cache: Cache) -> tuple[Drawn, Draws, Cache]:
        """Tokens. On a mesh: every device has all logits, and the keys and values of its heads."""
        if self.place is None:
            return *draw(logits, draws), cache
        put, place = jax.lax.with_sharding_constraint, self.place
        everywhere = place.sharding(PartitionSpec())
        if logits.shape[-1] % place.size == 0:  # made in parts, then gathered: else the head's weights would be
            logits = put(logits, place.sharding(PartitionSpec(None, place.axis)))
        drawn = draw(put(logits, everywhere), draws)
        return *put(drawn, jax.tree.map(lambda _: everywhere, drawn)), put(cache, cache.shardings(place))

    def compiled(self, function: Any, *arguments: Any, **static: Any) -> jax.stages.Compiled:
        """The program of one of the functions above for arguments of these shapes, compiled before it is timed."""
        key = layer_programs.key(function, arguments, static)
        if key not in self.programs:
            self.programs[key] = function.lower(*arguments, **static).compile()
        return self.programs[key]

    def run(
        self,
        params: nnx.State,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling],
        eos: Sequence[int] = (),
        on_token: Callable[[int, int], bool] | None = None,
        images: Mapping[str, np.ndarray] | None = None,
    ) -> list[list[int]]:
        """The new ids of each row of `continuations`."""
        found = self.continuations(
            params, prompts, max_new_tokens=max_new_tokens, sampling=sampling, eos=eos, on_token=on_token, images=images
        )
        return [row.ids for row in found]

    def continuations(
        self,
        params: nnx.State,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling],
        eos: Sequence[int] = (),
        on_token: Callable[[int, int], bool] | None = None,
        images: Mapping[str, np.ndarray] | None = None,
        past: Past | None = None,
    ) -> list[Continuation]:
        """Continue prompts of token ids.

        Args:
          params: the decoder's state, float or packed.
          prompts: one or more non-empty rows of ids.
          max_new_tokens: at most this many per row, and never beyond ``config.max_length``: a row that ends there
            is said to.
          sampling: how tokens are picked: for each row; or for all, of which row b then draws from stream b of the
            seed. Stop strings are not looked for here: see ``on_token``.
          eos: ids that end a row; not part of the result.
          on_token: called with (row, id) for each new token; returning True ends the row after it.
          images: those that the prompts' tokens stand for, from `awq_jax.models.vision.inputs.inputs`.
          past: of a single row: what earlier calls with it have read is not read again.

        Raises:
          ShapeError: on an empty prompt, ids outside the vocabulary, or no room for a new token.
          ConfigError: if ``max_new_tokens`` is not positive, ``sampling`` does not fit the rows or the vocabulary, or
            ``past`` comes with several rows or with images.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
        if past is not None and (len(prompts) != 1 or images):
            raise ConfigError("a past is that of one row of text")
        check_prompts(self.config, prompts)
        draws = begin(sampling, prompts, self.config.vocab_size)
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        ends = [{*eos, *s.stop_ids} for s in each]
        lengths = np.array([len(p) for p in prompts], np.int32)
        limits = np.minimum(max_new_tokens, self.config.max_length - lengths)
        needed = int((lengths + limits).max())

        start = time.perf_counter()
        (drawn, draws, cache), compiling = self._first(params, prompts, draws, needed, images, past)
        out = [Continuation() for _ in prompts]
        for row, one in zip(out, each, strict=True):
            row.prefill_seconds = time.perf_counter() - start - compiling
            row.logprobs = None if one.logprobs is None else []
        live, steps, fed, program = set(range(len(prompts))), int(limits.max()), 0, None
        start = time.perf_counter()
        for step in range(steps):
            token = drawn
            if step + 1 < steps:  # queued before the host looks at this token, so the device never waits
                arguments = params, cache, draws, token.ids, lengths + np.int32(step)
                if program is None:
                    program, start = self.compiled(self.step, *arguments), time.perf_counter()
                drawn, draws, cache = program(*arguments)
                fed += 1
            said = jax.device_get(token)
            for b in sorted(live):
                row, new = out[b], int(said.ids[b])
                row.made += 1
                if new in ends[b]:
                    row.finish_reason = "stop"
                else:
                    row.ids.append(new)
                    if row.logprobs is not None:
                        row.logprobs.append(token_logprobs(said, b, each[b].logprobs))
                    if on_token is not None and on_token(b, new):
                        row.finish_reason = "stop"
                    elif row.made < limits[b]:
                        continue
                    elif limits[b] < max_new_tokens:
                        log.warning(
                            "answer %d ends after %d tokens, not %d: the model's context of %d is full",
                            b, limits[b], max_new_tokens, self.config.max_length,
                        )  # fmt: skip
                live.discard(b)
                row.decode_seconds = time.perf_counter() - start
            if not live:
                break
        # A state that took tokens in cannot be taken back to those that the next prompt begins with.
        if past is not None and all(isinstance(layer, KeyValues) for layer in cache.layers):
            past.ids, past.cache = [*prompts[0], *out[0].ids[:fed]], cache
        return out

    def _first(
        self,
        params: nnx.State,
        prompts: Sequence[Sequence[int]],
        draws: Draws,
        needed: int,
        images: Mapping[str, np.ndarray] | None,
        past: Past | None,
    ) -> tuple[tuple[Drawn, Draws, Cache], float]:
        """What the prompts' first new tokens are, once they are there; and the seconds that compiling took.

        Args:
          needed: tokens that the longest row may come to.
        """
        seen, cache = (0, None) if past is None else past.take(prompts[0])
        lengths = np.array([len(p) - seen for p in prompts], np.int32)
        width = bucket(int(lengths.max()), SMALLEST_PROMPT)
        slots = max(bucket(needed, SMALLEST_CACHE), width)
        tokens = np.zeros((len(prompts), width), np.int32)
        for line, prompt in zip(tokens, prompts, strict=True):
            line[: len(prompt) - seen] = prompt[seen:]
        if cache is None and self.reads_by_layer:
            read, took = self.by_layer.prompt(params, tokens, lengths, draws, images, slots)
            return jax.block_until_ready(read()), took
        start = time.perf_counter()
        if cache is None:
            program = self.compiled(self.prefill, params, tokens, lengths, draws, images, slots=slots)
            arguments: tuple[Any, ...] = params, tokens, lengths, draws, images
        else:
            have = jax.tree.leaves(cache.layers)[0].shape[1]
            room = max(slots, bucket(seen + width, SMALLEST_CACHE))  # slots beyond the end would be written to others
            cache = cache.grown(room) if room > have else cache
            arguments = params, cache, tokens, lengths, draws, np.full(len(prompts), seen, np.int32)
            program = self.compiled(self.extend, *arguments)
        took = time.perf_counter() - start
        return jax.block_until_ready(program(*arguments)), took


def token_logprobs(said: Drawn, row: int, most: int | None) -> TokenLogprobs:
    """Of one row, which may ask for fewer of the likely ones than the batch has."""
    assert said.logprobs is not None
    assert said.likely is not None
    assert said.likely_logprobs is not None
    likely = zip(said.likely[row, :most].tolist(), said.likely_logprobs[row, :most].tolist(), strict=True)
    return TokenLogprobs(int(said.ids[row]), float(said.logprobs[row]), tuple(likely))


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse token ids that cannot be continued.

    Raises:
      ShapeError: there are none, or see `check_prompt`.
    """
    if not len(prompts):
        raise ShapeError("a prompt has no tokens; give at least one")
    for row, prompt in enumerate(prompts):
        check_prompt(config, prompt, f"prompt {row}")


def check_prompt(config: ModelConfig, prompt: Sequence[int], what: str) -> None:
    """Refuse token ids that cannot be continued; ``what`` they are called.

    Raises:
      ShapeError: on an empty prompt, ids outside the vocabulary, or no room for a new token.
    """
    if not len(prompt):
        raise ShapeError("a prompt has no tokens; give at least one")
    check_tokens(of_images(config, np.asarray(prompt)), config.vocab_size, what)
    if len(prompt) >= config.max_length:
        raise ShapeError(
            f"{what} has {len(prompt)} tokens; the model's context is {config.max_length} including the answer: "
            "shorten it"
        )


def bucket(length: int, smallest: int) -> int:
    """The size to compile for: a power of two up to 1024, then a multiple of 1024."""
    if length > 1024:
        return -(-length // 1024) * 1024
    return max(smallest, 1 << (length - 1).bit_length())


def check_tokens(tokens: np.ndarray, vocab_size: int, what: str) -> None:
    """Refuse token ids that have no embedding (XLA would clamp them silently).

    Raises:
      ShapeError: naming the first bad id.
    """
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ShapeError(f"{what}: token ids must be integers; got {tokens.dtype}")
    bad = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if bad.size:
        raise ShapeError(
            f"{what}: token id {bad.flat[0]} is outside the vocabulary of {vocab_size}; is it the right tokenizer?"
        )
