"""The images of a request: which are looked at, and what a piece of the prompt has of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from awq_jax.errors import ShapeError
from awq_jax.models.vision import grids
from awq_jax.models.vision.config import Gemma3Vision, QwenVision, VisionConfig
from awq_jax.models.vision.features import Features
from awq_jax.models.vision.singly import Picture
from awq_jax.models.vision.towers import Looked


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt that an engine takes as it is; as often as one likes.

    Attributes:
      ids: tokens.
      pictures: those that they stand for, of a model that looks at images.
    """

    ids: Sequence[int]
    pictures: Pictures | None = None


class Pictures:
    """Of one prompt, of a model that looks at images; there may be none.

    Args:
      config: the model's.
      prompt: token ids.
      pictures: in the order of their tokens.
      shapes: of what a tower makes of one, whatever their number.

    Attributes:
      keys: the prompt, with numbers in place of the tokens of images that no other image has.

    Raises:
      ShapeError: there are other numbers of tokens than the images have features.
    """

    def __init__(self, config: VisionConfig, prompt: Sequence[int], pictures: Sequence[Picture], shapes: Features):
        self._config, self._pictures, self._shapes = config, pictures, shapes
        self._seen = np.asarray(prompt) == config.token
        counts = [p.features for p in pictures]
        if self._seen.sum() != sum(counts):
            raise ShapeError(
                f"the prompt has {self._seen.sum()} tokens of images (id {config.token}), and its images take "
                f"{sum(counts)}: pass what the checkpoint's processor returns for both"
            )
        self._places = np.split(np.flatnonzero(self._seen), np.cumsum(counts)[:-1]) if counts else []
        self._features: list[Features | None] = [None] * len(pictures)
        self.keys = list(prompt)
        for picture, places in zip(pictures, self._places, strict=True):
            for i, place in enumerate(places):
                self.keys[place] = -1 - picture.name - i
        self._turns, self._shift = None, 0
        if isinstance(config, QwenVision):
            self._turns = np.broadcast_to(np.arange(len(prompt), dtype=np.int32), (3, 1, len(prompt)))
            if pictures:
                own = np.concatenate([p.arrays["image_grid_thw"] for p in pictures])
                turns, shift = (np.asarray(a) for a in grids.rope_positions(self._seen[None], own, config.merge))  # type: ignore[arg-type]
                self._turns, self._shift = turns.astype(np.int32), int(shift[0])

    def unseen(self, start: int) -> int | None:
        """The first image that is to be looked at before the prompt is read on from a token."""
        pairs = enumerate(zip(self._features, self._places, strict=True))
        return next((i for i, (known, places) in pairs if known is None and places[-1] >= start), None)

    def arrays(self, number: int) -> dict[str, np.ndarray]:
        """What a tower takes."""
        return self._pictures[number].arrays

    def put(self, number: int, features: Features) -> None:
        """What it made of that."""
        count = self._pictures[number].features
        self._features[number] = jax.tree.map(lambda a: np.asarray(a)[:count], features)

    def whole(self, start: int, end: int) -> int:
        """The last place up to ``end`` where the reading from ``start`` may stop: not within an image whose tokens
        attend to those after them."""
        if isinstance(self._config, Gemma3Vision):
            for places in self._places:
                first = int(places[0])
                if start < first < end <= places[-1]:
                    return first
        return end

    def piece(self, start: int, length: int, width: int) -> Looked:
        """Of ``length`` tokens from ``start``, padded to ``width``."""
        seen = np.zeros((1, width), bool)
        seen[0, :length] = self._seen[start : start + length]
        flat, *deep = (np.zeros((1, width, a.shape[-1]), a.dtype) for a in (self._shapes.flat, *self._shapes.deep))
        for features, places in zip(self._features, self._places, strict=True):
            own = (places >= start) & (places < start + length)
            if features is not None and own.any():
                for to, given in zip((flat, *deep), (features.flat, *features.deep), strict=True):
                    to[0, places[own] - start] = given[own]
        if self._turns is None:
            return Looked(seen, flat)
        turns = np.zeros((3, 1, width), np.int32)
        turns[..., :length] = self._turns[..., start : start + length]
        turns[..., length:] = turns[..., length - 1 : length]
        return Looked(seen, flat, tuple(deep), turns, np.int32(self._shift))  # type: ignore[arg-type]
