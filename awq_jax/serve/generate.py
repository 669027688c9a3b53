"""Batched generation with a key/value cache: one compiled prefill per length bucket, one compiled step.

Prompts are padded on the right, and every row keeps its own position: slot s of the cache holds
position s, so causality alone hides padding and no attention mask is needed.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from awq_jax.errors import ConfigError, ShapeError
from awq_jax.models.config import ModelConfig
from awq_jax.models.layers.cache import Cache
from awq_jax.models.vision.inputs import of_images
from awq_jax.placement import Placement
from awq_jax.serve.sampling import Mode, Sampling, sample

log = logging.getLogger(__name__)

SMALLEST_PROMPT, SMALLEST_CACHE = 16, 64


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
        xla = dict(options) if options else None
        self.forward = jax.jit(lambda params, input_ids, **images: nnx.merge(graphdef, params)(input_ids, **images))
        self.prefill = jax.jit(self._prefill, static_argnames=("slots", "mode"), compiler_options=xla)
        self.step = jax.jit(self._step, static_argnames=("mode",), donate_argnames=("cache",), compiler_options=xla)

    def _prefill(
        self,
        params: nnx.State,
        tokens: jax.Array,
        lengths: jax.Array,
        key: jax.Array,
        temperature: jax.Array,
        top_k: jax.Array,
        top_p: jax.Array,
        images: Mapping[str, jax.Array] | None = None,
        *,
        slots: int,
        mode: Mode,
    ) -> tuple[jax.Array, Cache]:
        """First new token ``[B]`` of right-padded ``tokens [B, P]``, and the cache with ``slots`` slots."""
        decoder = nnx.merge(self.graphdef, params)
        rows, width = tokens.shape
        positions = jnp.minimum(jnp.arange(width), lengths[:, None] - 1)
        hidden, cache = decoder.hidden(tokens, positions, None, images)
        logits, cache = self._kept(decoder.head(hidden[jnp.arange(rows), lengths - 1]), cache.grown(slots))
        return sample(logits, key, temperature, top_k, top_p, mode), cache

    def _step(
        self,
        params: nnx.State,
        cache: Cache,
        token: jax.Array,
        position: jax.Array,
        key: jax.Array,
        temperature: jax.Array,
        top_k: jax.Array,
        top_p: jax.Array,
        *,
        mode: Mode,
    ) -> tuple[jax.Array, Cache]:
        """The token after ``token [B]``, which stands at ``position [B]``."""
        decoder = nnx.merge(self.graphdef, params)
        hidden, cache = decoder.hidden(token[:, None], position[:, None], cache)
        logits, cache = self._kept(decoder.head(hidden[:, 0]), cache)
        return sample(logits, key, temperature, top_k, top_p, mode), cache

    def _kept(self, logits: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Where they lie on a mesh: every device has all logits, and the keys and values of its heads."""
        if self.place is None:
            return logits, cache
        put, place = jax.lax.with_sharding_constraint, self.place
        if logits.shape[-1] % place.size == 0:  # made in parts, then gathered: else the head's weights would be
            logits = put(logits, place.sharding(PartitionSpec(None, place.axis)))
        return put(logits, place.sharding(PartitionSpec())), put(cache, cache.shardings(place))

    def run(
        self,
        params: nnx.State,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        eos: Sequence[int] = (),
        on_token: Callable[[int, int], bool] | None = None,
        images: Mapping[str, np.ndarray] | None = None,
    ) -> list[list[int]]:
        """Continue prompts of token ids.

        Args:
          params: the decoder's state, float or packed.
          prompts: one or more non-empty rows of ids.
          max_new_tokens: at most this many per row, and never beyond ``config.max_length``: a row that ends there
            is said to.
          sampling: how tokens are picked.
          seed: of the random stream; row b's draws depend on ``seed``, b and the step only.
          eos: ids that end a row; not part of the result.
          on_token: called with (row, id) for each new token; returning True ends the row after it.
          images: those that the prompts' tokens stand for, from `awq_jax.models.vision.inputs.inputs`.

        Returns:
          The new ids of each row.

        Raises:
          ShapeError: on an empty prompt, ids outside the vocabulary, or no room for a new token.
          ConfigError: if ``max_new_tokens`` is not positive.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
        lengths = np.array([len(p) for p in prompts], np.int32)
        check_prompts(self.config, prompts)
        limits = np.minimum(max_new_tokens, self.config.max_length - lengths)
        width = bucket(int(lengths.max()), SMALLEST_PROMPT)
        slots = max(bucket(int((lengths + limits).max()), SMALLEST_CACHE), width)
        tokens = np.zeros((len(prompts), width), np.int32)
        for line, prompt in zip(tokens, prompts, strict=True):
            line[: len(prompt)] = prompt

        root = jax.random.key(seed)
        options = (np.float32(sampling.temperature), np.int32(sampling.top_k), np.float32(sampling.top_p))
        token, cache = self.prefill(
            params, tokens, lengths, jax.random.fold_in(root, 0), *options, images, slots=slots, mode=sampling.mode
        )
        out: list[list[int]] = [[] for _ in prompts]
        live = set(range(len(prompts)))
        steps = int(limits.max())
        for step in range(steps):
            following = None
            if step + 1 < steps:  # queued before the host looks at this token, so the device never waits
                key = jax.random.fold_in(root, step + 1)
                following, cache = self.step(
                    params, cache, token, lengths + np.int32(step), key, *options, mode=sampling.mode
                )
            ids = np.asarray(token)
            for row in sorted(live):
                new = int(ids[row])
                if new in eos:
                    live.discard(row)
                    continue
                out[row].append(new)
                if on_token is not None and on_token(row, new):
                    live.discard(row)
                elif len(out[row]) == limits[row]:
                    live.discard(row)
                    if limits[row] < max_new_tokens:
                        log.warning(
                            "answer %d ends after %d tokens, not %d: the model's context of %d is full",
                            row, limits[row], max_new_tokens, self.config.max_length,
                        )  # fmt: skip
            if not live:
                break
            token = following
        return out


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse token ids that cannot be continued.

    Raises:
      ShapeError: on an empty prompt, ids outside the vocabulary, or no room for a new token.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    if not len(lengths) or lengths.min() == 0:
        raise ShapeError("a prompt has no tokens; give at least one")
    for row, prompt in enumerate(prompts):
        check_tokens(of_images(config, np.asarray(prompt)), config.vocab_size, f"prompt {row}")
    if lengths.max() >= config.max_length:
        raise ShapeError(
            f"prompt {int(lengths.argmax())} has {lengths.max()} tokens; the model's context is "
            f"{config.max_length} including the answer: shorten it"
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
