"""The images of a text one at a time, in arrays of few shapes, so that few programs look at them all."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from awq_jax.errors import ShapeError
from awq_jax.models.vision.config import Gemma3Vision, QwenVision, VisionConfig
from awq_jax.models.vision.inputs import features_of_each

SMALLEST = 64  # features that patches are padded to, and twice and four times as many ...

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image.

    Attributes:
      arrays: as a tower takes them (see `awq_jax.models.vision.towers.pictures`), of one of `shapes`.
      features: tokens that it stands for.
      name: a number that no other image has.
    """

    arrays: dict[str, np.ndarray]
    features: int
    name: int


def singly(config: VisionConfig, images: Mapping[str, np.ndarray], most: int) -> list[Picture]:
    """The images of a text.

    Args:
      images: what `awq_jax.models.vision.inputs.inputs` returns, without ``input_ids``.
      most: features of one.

    Raises:
      ShapeError: an image has more.
    """
    found, after = [], 0
    for i, features in enumerate(features_of_each(config, images)):
        if features > most:
            raise ShapeError(f"image {i} takes {features} tokens; there is room for {most}: make it smaller")
        pixels = images["pixel_values"]
        if isinstance(config, QwenVision):
            count = features * config.merge**2
            own = pixels[after : after + count]
            after += count
            room = fitting(_sizes(most), features) * config.merge**2
        else:
            own = pixels[i : i + 1]
            count, room = (own.shape[1], _tiles(config)) if "image_tiles" in images else (1, 1)
        arrays = {key: value[i : i + 1] for key, value in images.items()}
        arrays["pixel_values"] = _filled(own, room, 0 if isinstance(config, QwenVision) else 1)
        name = hashlib.blake2b(b"".join(a.tobytes() for a in arrays.values()), digest_size=16)
        found.append(Picture(arrays, features, int.from_bytes(name.digest())))
    return found


def shapes(config: VisionConfig, most: int) -> Iterator[Shapes]:
    """All that `Picture.arrays` may be, for images of at most so many features."""
    f32, i32 = np.dtype(np.float32), np.dtype(np.int32)
    if isinstance(config, QwenVision):
        width = config.channels * config.temporal * config.patch**2
        for features in _sizes(most):
            patches = features * config.merge**2
            yield {
                "pixel_values": jax.ShapeDtypeStruct((patches, width), f32),
                "image_grid_thw": jax.ShapeDtypeStruct((1, 3), i32),
            }
        return
    side = config.tower.image
    picture = (config.tower.channels, side, side)
    if isinstance(config, Gemma3Vision) or not config.tiles:
        yield {"pixel_values": jax.ShapeDtypeStruct((1, *picture), f32)}
        return
    yield {
        "pixel_values": jax.ShapeDtypeStruct((1, _tiles(config), *picture), f32),
        "image_sizes": jax.ShapeDtypeStruct((1, 2), i32),
        "image_tiles": jax.ShapeDtypeStruct((1, 2), i32),
    }


def largest(config: VisionConfig) -> int | None:
    """Features of the largest image, or None for no limit but what a processor has."""
    if isinstance(config, QwenVision):
        return None
    if isinstance(config, Gemma3Vision):
        return config.side**2
    tower = config.tower
    each = tower.side**2 + tower.class_token - config.drop_first
    if not config.tiles:
        return each
    return max(each + h // tower.patch * (w // tower.patch + 1) for h, w in config.tiles)


def fitting(sizes: Sequence[int], need: int) -> int:
    """The smallest of these sizes, which rise, that is enough."""
    return next(size for size in sizes if size >= need)


def _sizes(most: int) -> list[int]:
    """Features that patches are padded to, rising; the last is ``most``."""
    found = []
    size = SMALLEST
    while 2 * size <= most:
        found.append(size)
        size *= 2
    return [*found, most]


def _tiles(config: VisionConfig) -> int:
    """Of the image that is cut into most, the whole image among them."""
    assert not isinstance(config, Gemma3Vision | QwenVision)
    return 1 + max(h * w // config.tower.image**2 for h, w in config.tiles)


def _filled(a: np.ndarray, room: int, axis: int) -> np.ndarray:
    """With zeros after it, up to ``room`` along an axis; or cut, where there are more than an image can have."""
    if axis == 1 and a.ndim < 5:
        return a
    a = np.take(a, np.arange(min(room, a.shape[axis])), axis=axis)
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, room - a.shape[axis])
    return np.pad(a, widths)
