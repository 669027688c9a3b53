"""Normalisations."""

import jax
import jax.numpy as jnp
from flax import nnx

from awq_jax.models.config import NormConfig


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis, in float32, returned in the dtype of ``x``.

    Args:
      config: kind and parameters.
      *shape: shape of the scale; its last axis is normalised, the others are broadcast.
    """

    def __init__(self, config: NormConfig, *shape: int):
        self.config = config
        if config.scale:
            self.scale = nnx.Param(jnp.full(shape, 1.0 - config.offset))
        if config.bias:
            self.bias = nnx.Param(jnp.zeros(shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x [..., *shape]`` to the same shape."""
        c = self.config
        h = x.astype(jnp.float32)
        if c.kind == "layer":
            h = h - jnp.mean(h, axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + c.eps)
        if c.offset or c.bias:  # rounded once, as their checkpoints were trained
            if c.scale:
                scale = self.scale.get_value().astype(jnp.float32)
                h = h * (c.offset + scale if c.offset else scale)
            if c.bias:
                h = h + self.bias.get_value().astype(jnp.float32)
            return h.astype(x.dtype)
        h = h.astype(x.dtype)
        return (self.scale.get_value() * h).astype(x.dtype) if c.scale else h
