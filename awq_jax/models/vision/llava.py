"""LLaVA, LLaVA-NeXT and Gemma 3: pictures of one size through a vision transformer and a projector."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from awq_jax.models.config import NormConfig
from awq_jax.models.layers.linear import Linear
from awq_jax.models.layers.mlp import ACTIVATIONS
from awq_jax.models.layers.norm import Norm
from awq_jax.models.vision.config import Gemma3Vision, LlavaVision
from awq_jax.models.vision.features import Features
from awq_jax.models.vision.vit import ViT


class Projector(nnx.Module):
    """Two linears with an activation between them."""

    def __init__(self, config: LlavaVision, out: int, rngs: nnx.Rngs):
        size = config.tower.size * len(config.features)
        self.linear_1 = Linear(size, out, use_bias=config.bias, rngs=rngs)
        self.linear_2 = Linear(out, out, use_bias=config.bias, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x [..., size]`` to ``[..., out]``."""
        return self.linear_2(ACTIVATIONS[self.activation](self.linear_1(x)))


class LlavaTower(nnx.Module):
    """Pictures to features."""

    def __init__(self, config: LlavaVision, out: int, rngs: nnx.Rngs):
        self.tower = ViT(config.tower, rngs)
        self.projector = Projector(config, out, rngs)
        if config.tiles:
            self.image_newline = nnx.Param(jnp.zeros(out))
        self.config = config

    def __call__(self, images: Mapping[str, jax.Array], room: int) -> Features:
        """See `Features`.

        Args:
          images: ``pixel_values [I, channels, H, W]``; LLaVA-NeXT: ``[I, tiles, channels, H, W]``, the
            whole image first, with ``image_tiles`` and ``image_sizes``.
          room: at most so many features are wanted.
        """
        c = self.config
        pixels = images["pixel_values"]
        states = self.tower(pixels.reshape(-1, *pixels.shape[-3:]))
        x = jnp.concatenate([states[i] for i in c.features], axis=-1)
        x = self.projector(x[:, 1:] if c.drop_first else x)
        if not c.tiles:
            return Features(x.reshape(-1, x.shape[-1]))
        x = x.reshape(*pixels.shape[:2], *x.shape[1:])
        return Features(unpadded(x, self.image_newline.get_value(), images["image_tiles"], images["image_sizes"], room))


def kept(side: int, tiles: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
    """The part of the tiles that shows the image, the rest being a border.

    Args:
      side: features along an edge of a tile.
      tiles: int32 ``[I, 2]``: rows and columns of tiles.
      sizes: int32 ``[I, 2]``: height and width of the images, in pixels.

    Returns:
      int32 ``[I]`` each: first row, first column, number of rows and of columns, in features.
    """
    height, width = tiles[:, 0] * side, tiles[:, 1] * side
    wide = sizes[:, 1] * height > width * sizes[:, 0]  # wider than the tiles: borders above and below
    top = jnp.where(wide, (height - sizes[:, 0] * width // sizes[:, 1]) // 2, 0)
    left = jnp.where(wide, 0, (width - sizes[:, 1] * height // sizes[:, 0]) // 2)
    return top, left, height - 2 * top, width - 2 * left


def unpadded(x: jax.Array, newline: jax.Array, tiles: jax.Array, sizes: jax.Array, room: int) -> jax.Array:
    """Features of each image: those of the whole picture, then the tiles' row by row, with a ``newline`` after each.

    Args:
      x: ``[I, 1 + most tiles, side * side, hidden]``.
      newline: ``[hidden]``.
      tiles, sizes: see `kept`.
      room: rows of the result.

    Returns:
      ``[room, hidden]``.
    """
    whole = x.shape[2]
    side = round(whole**0.5)
    top, left, rows, columns = kept(side, tiles, sizes)
    ends = jnp.cumsum(whole + rows * (columns + 1))
    number = jnp.arange(room)
    image = jnp.minimum(jnp.searchsorted(ends, number, side="right"), len(ends) - 1)
    inside = number - jnp.concatenate([jnp.zeros(1, ends.dtype), ends])[image]
    first = inside < whole
    row, column = (inside - whole) // (columns + 1)[image], (inside - whole) % (columns + 1)[image]
    end_of_row = ~first & (column == columns[image])
    row, column = row + top[image], jnp.minimum(column, columns[image] - 1) + left[image]
    tile = 1 + row // side * tiles[image, 1] + column // side
    picked = x[image, jnp.where(first, 0, tile), jnp.where(first, inside, row % side * side + column % side)]
    return jnp.where(end_of_row[:, None], newline.astype(x.dtype), picked)


class Gemma3Projector(nnx.Module):
    """Averages over squares, normalised and projected."""

    def __init__(self, config: Gemma3Vision, out: int):
        size = config.tower.size
        self.norm = Norm(NormConfig("rms", config.tower.eps, offset=1.0), size)
        self.weight = nnx.Param(jnp.zeros((size, out)))
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x [I, patches, size]`` to ``[I, side * side, out]``."""
        c = self.config
        step = c.tower.side // c.side
        grid = x.reshape(x.shape[0], c.tower.side, c.tower.side, -1)[:, : c.side * step, : c.side * step]
        grid = grid.reshape(x.shape[0], c.side, step, c.side, step, -1).mean(axis=(2, 4))
        return (self.norm(grid.reshape(x.shape[0], c.side**2, -1)) @ self.weight.get_value()).astype(x.dtype)


class Gemma3Tower(nnx.Module):
    """Pictures to features."""

    def __init__(self, config: Gemma3Vision, out: int, rngs: nnx.Rngs):
        self.tower = ViT(config.tower, rngs)
        self.projector = Gemma3Projector(config, out)

    def __call__(self, images: Mapping[str, jax.Array], room: int) -> Features:
        """See `Features`; ``images``: ``pixel_values [I, channels, H, W]``."""
        x = self.tower.post_layernorm(self.tower(images["pixel_values"])[-1])
        x = self.projector(x)
        return Features(x.reshape(-1, x.shape[-1]))
