"""What a transformers processor returns, checked and as the arrays a model takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from awq_jax.errors import ShapeError
from awq_jax.models.config import ModelConfig
from awq_jax.models.vision.config import Gemma3Vision, LlavaVision, QwenVision, VisionConfig
from awq_jax.models.vision.llava import kept
from awq_jax.models.vision.towers import pictures


def inputs(config: ModelConfig, batch: Mapping[str, object]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A processor's output as arguments of `awq_jax.Model.apply`.

    Args:
      config: architecture.
      batch: ``input_ids [B, T]``, and optionally ``attention_mask [B, T]`` (rows padded on either side),
        ``pixel_values`` and what goes with them; lists, NumPy or torch.

    Returns:
      Arrays by name, rows of ``input_ids`` padded on the right, and int32 ``[B]``: tokens in each row.

    Raises:
      ConfigError: on something that the model cannot look at, or half of what it needs.
      ShapeError: if shapes do not fit the model or each other, or the images do not have as many
        features as there are tokens for them.
    """
    arrays = {k: _array(v, k) for k, v in batch.items() if v is not None}
    if "input_ids" not in arrays or arrays["input_ids"].ndim != 2 or not arrays["input_ids"].size:
        shape = arrays["input_ids"].shape if "input_ids" in arrays else None
        raise ShapeError(f"input_ids must be [batch, length]; got {'nothing' if shape is None else f'shape {shape}'}")
    tokens = arrays.pop("input_ids")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ShapeError(f"input_ids must be integers; got {tokens.dtype}")
    mask = arrays.get("attention_mask")
    tokens, lengths = _to_the_left(tokens.astype(np.int32), mask)
    vision = config.vision
    if isinstance(vision, LlavaVision) and vision.tiles and "image_sizes" in arrays:
        arrays["image_tiles"] = np.array([_tiles(s, vision) for s in arrays["image_sizes"].tolist()], np.int32)
    images = {k: np.asarray(v) for k, v in pictures(vision, arrays).items()}
    images = {k: v.astype(np.int32 if np.issubdtype(v.dtype, np.integer) else np.float32) for k, v in images.items()}
    if vision is not None and images:
        have, want = sum(features_of_each(vision, images)), int((tokens == vision.token).sum())
        if have != want:
            raise ShapeError(
                f"the images have {have} features, the text {want} tokens for them (id {vision.token}); make both with "
                "one call of the checkpoint's own processor, and do not cut the text"
            )
    return {"input_ids": tokens, **images}, lengths


def of_images(config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Token ids with 0 for those of images, which need not be in the vocabulary."""
    return tokens if config.vision is None else np.where(tokens == config.vision.token, 0, tokens)


def _array(value: Any, name: str) -> np.ndarray:
    if hasattr(value, "detach"):  # torch, of which NumPy does not know every dtype
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    if isinstance(value, Sequence) and value and hasattr(value[0], "detach"):
        value = [_array(v, name) for v in value]
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    if array.dtype == object:
        raise ShapeError(f"{name} is ragged; ask the processor for padding=True")
    return array


def _to_the_left(tokens: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows with their padding after them, and how many tokens they have."""
    if mask is None:
        return tokens, np.full(len(tokens), tokens.shape[1], np.int32)
    if mask.shape != tokens.shape:
        raise ShapeError(f"attention_mask has shape {mask.shape}, input_ids {tokens.shape}")
    order = np.argsort(mask == 0, axis=1, kind="stable")
    return np.take_along_axis(tokens, order, axis=1), (mask != 0).sum(axis=1).astype(np.int32)


def _tiles(size: Sequence[int], config: LlavaVision) -> tuple[int, int]:
    """Rows and columns of tiles that an image of that height and width was cut into.

    As the processors choose: the picture that shows most of the image, then that with the least border.
    """
    height, width = size

    def shown(picture: tuple[int, int]) -> tuple[int, int]:
        h, w = picture
        scale = min(w / width, h / height)
        area = min(int(width * scale) * int(height * scale), width * height)
        return area, area - h * w

    h, w = max(config.tiles, key=shown)
    return h // config.tower.image, w // config.tower.image


def features_of_each(config: VisionConfig, images: Mapping[str, np.ndarray]) -> list[int]:
    """How many features each image has.

    Raises:
      ShapeError: the shapes are not those that the tower takes.
    """
    pixels = images["pixel_values"]
    if isinstance(config, QwenVision):
        grids = images["image_grid_thw"]
        want = (config.channels * config.temporal * config.patch**2,)
        uneven = grids.ndim != 2 or grids.shape[1] != 3 or (grids[:, 1:] % config.merge).any()
        if uneven or pixels.shape != (int(grids.prod(axis=1).sum()), *want):
            raise ShapeError(
                f"pixel_values of shape {pixels.shape} with image_grid_thw {grids.tolist()}: the tower takes "
                f"[patches, {want[0]}], and rows and columns in multiples of {config.merge}"
            )
        return [int(n) for n in grids.prod(axis=1) // config.merge**2]
    tower = config.tower
    tiled = isinstance(config, LlavaVision) and bool(config.tiles)
    shape = (tower.channels, tower.image, tower.image)
    if pixels.ndim != 4 + tiled or pixels.shape[-3:] != shape:
        raise ShapeError(
            f"pixel_values of shape {pixels.shape}: the tower takes [images, {'tiles, ' if tiled else ''}"
            f"{', '.join(map(str, shape))}]"
        )
    if isinstance(config, Gemma3Vision):
        return [config.side**2] * len(pixels)
    each = tower.side**2 + tower.class_token - config.drop_first
    if not tiled:
        return [each] * len(pixels)
    tiles, sizes = images["image_tiles"], images["image_sizes"]
    if len(tiles) != len(pixels) or (tiles.prod(axis=1) >= pixels.shape[1]).any():
        raise ShapeError(
            f"pixel_values of shape {pixels.shape} with image_sizes {sizes.tolist()}, which make {tiles.tolist()} "
            "tiles besides the whole image; make both with one call of the checkpoint's own processor"
        )
    _, _, rows, columns = (np.asarray(a) for a in kept(tower.side, jnp.asarray(tiles), jnp.asarray(sizes)))
    return [int(n) for n in each + rows * (columns + 1)]
