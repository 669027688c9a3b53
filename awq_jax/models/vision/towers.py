"""The tower of a `VisionConfig`, and what its features change for the decoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from awq_jax.errors import ConfigError
from awq_jax.models.vision import grids
from awq_jax.models.vision.config import Gemma3Vision, LlavaVision, QwenVision, VisionConfig
from awq_jax.models.vision.features import blocks, place
from awq_jax.models.vision.llava import Gemma3Tower, LlavaTower
from awq_jax.models.vision.qwen import QwenTower

TOWERS: dict[type, Any] = {LlavaVision: LlavaTower, Gemma3Vision: Gemma3Tower, QwenVision: QwenTower}
A = TypeVar("A", jax.Array, np.ndarray)
# What processors return besides; a decoder has it from the tokens.
IMPLIED = frozenset(("attention_mask", "token_type_ids", "mm_token_type_ids"))


@dataclasses.dataclass(frozen=True)
class Seen:
    """What images change in one call of the decoder.

    Attributes:
      embedded: ``[B, T, hidden]``: what the first layer reads.
      turns: int32 ``[3, B, T]``: positions to rotate by; None for those of the tokens.
      shift: int32 ``[B]``: what later tokens' positions differ by from their number; None for nothing.
      blocks: int32 ``[B, T]``: tokens with the same number of 0 or more see each other whatever their
        order; None for none.
      deep: ``[B, T, hidden]`` each, added after the first layers.
    """

    embedded: jax.Array
    turns: jax.Array | None = None
    shift: jax.Array | None = None
    blocks: jax.Array | None = None
    deep: tuple[jax.Array, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Looked:
    """What a tower has made of images, at the tokens of a part of a text that stand for it.

    Attributes:
      seen: bool ``[B, T]``: which tokens do.
      placed: ``[B, T, hidden]``: the features; 0 elsewhere.
      deep: of the same shape each, see `Seen`.
      turns, shift: see `Seen`.
    """

    seen: jax.Array | np.ndarray
    placed: jax.Array | np.ndarray
    deep: tuple[jax.Array | np.ndarray, ...] = ()
    turns: jax.Array | np.ndarray | None = None
    shift: jax.Array | np.ndarray | None = None


def needed(config: VisionConfig) -> tuple[str, ...]:
    """The arrays that go with an image's tokens."""
    if isinstance(config, QwenVision):
        return ("pixel_values", "image_grid_thw")
    tiled = isinstance(config, LlavaVision) and config.tiles
    return ("pixel_values", "image_sizes", "image_tiles") if tiled else ("pixel_values",)


def pictures(config: VisionConfig | None, arrays: Mapping[str, A | None]) -> dict[str, A]:
    """Those of ``arrays`` that the tower takes; none for a text.

    Raises:
      ConfigError: on something that the model cannot look at, or half of what it needs.
    """
    known: tuple[str, ...] = () if config is None else needed(config)
    given = {k: v for k, v in arrays.items() if v is not None and k not in IMPLIED}
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(
            f"{', '.join(unknown)}: the model takes {', '.join(('input_ids', *known))}; videos and sounds are not "
            "supported, and what a processor returns goes through model.inputs first"
        )
    if given and (missing := [k for k in known if k not in given]):
        raise ConfigError(f"{', '.join(given)} came without {', '.join(missing)}; pass model.inputs(processor(...))")
    return given


def look(
    config: VisionConfig,
    tower: nnx.Module,
    tokens: jax.Array,
    text: jax.Array,
    images: Mapping[str, jax.Array] | Looked,
) -> Seen:
    """Features of ``images`` in place of their tokens.

    Args:
      config, tower: the model's.
      tokens: int32 ``[B, T]``.
      text: ``[B, T, hidden]``: the tokens, embedded.
      images: from `pictures`, not empty; or what was made of them.
    """
    if isinstance(images, Looked):
        seen = jnp.asarray(images.seen)
        embedded = jnp.where(seen[..., None], jnp.asarray(images.placed).astype(text.dtype), text)
        turns, shift = (None if a is None else jnp.asarray(a) for a in (images.turns, images.shift))
        deep = tuple(jnp.asarray(d).astype(text.dtype) for d in images.deep)
        return Seen(embedded, turns, shift, blocks(seen) if isinstance(config, Gemma3Vision) else None, deep)
    seen = tokens == config.token
    features = tower({**images, "pixel_values": images["pixel_values"].astype(text.dtype)}, tokens.size)
    embedded = place(features.flat, seen, text)
    if isinstance(config, Gemma3Vision):
        return Seen(embedded, blocks=blocks(seen))
    if not isinstance(config, QwenVision):
        return Seen(embedded)
    turns, shift = grids.rope_positions(seen, images["image_grid_thw"], config.merge)
    deep = tuple(place(d, seen, jnp.zeros_like(text)) for d in features.deep)
    return Seen(embedded, turns, shift, deep=deep)
