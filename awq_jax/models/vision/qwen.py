"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from awq_jax.models.config import MLPConfig, NormConfig
from awq_jax.models.layers import rope
from awq_jax.models.layers.linear import Linear
from awq_jax.models.layers.mlp import MLP
from awq_jax.models.layers.norm import Norm
from awq_jax.models.vision import grids
from awq_jax.models.vision.config import QwenVision
from awq_jax.models.vision.features import Features
from awq_jax.models.vision.vit import Patches, Table, attend


class Attention(nnx.Module):
    """Attention among the patches of a picture or a window, rotated by row and column."""

    def __init__(self, config: QwenVision, rngs: nnx.Rngs):
        self.qkv = Linear(config.size, 3 * config.size, rngs=rngs)
        self.proj = Linear(config.size, config.size, rngs=rngs)
        self.heads = config.heads

    def __call__(self, x: jax.Array, seen: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
        """``x [P, size]`` to the same shape; ``seen [P, P]``: which patches see each other."""
        q, k, v = (a.reshape(len(x), self.heads, -1) for a in jnp.split(self.qkv(x), 3, axis=-1))
        q, k = (rope.rotate(a.astype(jnp.float32), *turn).astype(x.dtype) for a in (q, k))
        return self.proj(attend(q, k, v, seen).reshape(x.shape))


class Block(nnx.Module):
    """Attention and MLP, each after a norm and added."""

    def __init__(self, config: QwenVision, rngs: nnx.Rngs):
        c = config
        self.norm1, self.norm2 = Norm(_norm(c), c.size), Norm(_norm(c), c.size)
        self.attn = Attention(c, rngs)
        self.mlp = MLP(c.size, MLPConfig(c.mlp, c.activation, gated=c.gated, bias=True), rngs)

    def __call__(self, x: jax.Array, seen: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
        """See `Attention`."""
        x = x + self.attn(self.norm1(x), seen, turn)
        return x + self.mlp(self.norm2(x))


class Merger(nnx.Module):
    """Squares of patches to features of the decoder's width; the norm is over a patch, or the whole ``square``."""

    def __init__(self, config: QwenVision, out: int, square: bool, rngs: nnx.Rngs):
        inner = config.size * config.merge**2
        self.norm = Norm(_norm(config), inner if square else config.size)
        self.fc1, self.fc2 = Linear(inner, inner, rngs=rngs), Linear(inner, out, rngs=rngs)
        self.inner, self.square = inner, square

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x [P, size]`` to ``[P / merge^2, out]``."""
        x = self.norm(x.reshape(-1, self.inner)) if self.square else self.norm(x).reshape(-1, self.inner)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class QwenTower(nnx.Module):
    """Patches of all images in one sequence, to features."""

    def __init__(self, config: QwenVision, out: int, rngs: nnx.Rngs):
        c = config
        self.patch_embed = Patches(c.size, (c.channels, c.temporal, c.patch, c.patch), c.patch_bias, rngs)
        if c.positions is not None:
            self.pos_embed = Table(c.positions**2, c.size, rngs)
        self.blocks = nnx.List([Block(c, rngs) for _ in range(c.layers)])
        self.merger = Merger(c, out, False, rngs)
        self.deepstack = nnx.List([Merger(c, out, True, rngs) for _ in c.deepstack])
        self.config = config

    def __call__(self, images: Mapping[str, jax.Array], room: int) -> Features:
        """See `Features`; ``images``: ``pixel_values [P, pixels]`` and ``image_grid_thw [I, 3]``."""
        c = self.config
        pixels = images["pixel_values"]
        where = grids.places(images["image_grid_thw"], c.merge, pixels.shape[0])
        picture = grids.same_picture(where)
        window = picture if c.window is None else grids.same_window(where, c.window * c.merge)
        turn = grids.angles(where, c.size // c.heads)
        x = self.patch_embed(pixels)
        if c.positions is not None:
            x = x + grids.stretched(self.pos_embed(), c.positions, where).astype(x.dtype)
        deep = []
        for i, block in enumerate(self.blocks):
            x = block(x, picture if i in c.full else window, turn)
            if i in c.deepstack:
                deep.append(self.deepstack[c.deepstack.index(i)](x))
        return Features(self.merger(x), tuple(deep))


def _norm(config: QwenVision) -> NormConfig:
    return NormConfig("rms", 1e-6) if config.rms else NormConfig("layer", 1e-6, bias=True)
