"""Rotary position embedding (arXiv 2104.09864) and the ways checkpoints stretch its context.

Numbers follow `transformers.modeling_rope_utils`, so that a checkpoint means the same here.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.models.config import RopeConfig


def cos_sin(config: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation angles.

    Args:
      config: kind and constants.
      head_dim: channels of a head; half as many angles.
      positions: int32 ``[B, T]``.

    Returns:
      Two float32 arrays ``[B, T, 1, head_dim / 2]``.
    """
    if config.kind == "dynamic":
        inv_freq = _dynamic(config, head_dim, positions)
    else:
        inv_freq = jnp.asarray(inverse_frequencies(config, head_dim))
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    angles = angles[..., None, :]
    return jnp.cos(angles) * config.attention_factor, jnp.sin(angles) * config.attention_factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate channel pairs ``(i, i + head_dim / 2)`` of ``x [B, T, heads, head_dim]``; keeps its dtype."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per token of each channel pair: float32 ``[head_dim / 2]`` (``dynamic``: before growth)."""
    plain = config.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if config.kind == "linear":
        plain = plain / config.factor
    elif config.kind == "llama3":
        plain = _llama3(config, plain)
    elif config.kind == "yarn":
        plain = _yarn(config, plain, head_dim)
    return plain.astype(np.float32)


def _llama3(config: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Stretch long wavelengths, keep short ones, blend between (Llama 3.1)."""
    turns = config.original_length * plain / (2 * math.pi)  # over the original context
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (keep + (1 - keep) / config.factor)


def _yarn(config: RopeConfig, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """Stretch by wavelength with a linear ramp over dimensions (arXiv 2309.00071, section 3.2)."""

    def dimension(turns: float) -> float:
        length = config.original_length / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low or 0.001), 0.0, 1.0)
    return plain * (1 - ramp) + plain / config.factor * ramp


def _dynamic(config: RopeConfig, head_dim: int, positions: jax.Array) -> jax.Array:
    """NTK scaling: beyond the original context the base grows with each row's length; ``[B, 1, head_dim / 2]``."""
    length = jnp.maximum(positions.max(axis=-1) + 1, config.original_length).astype(jnp.float32)
    stretch = config.factor * length / config.original_length - (config.factor - 1)
    base = config.theta * stretch ** (head_dim / (head_dim - 2))
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return base[:, None, None] ** -exponent
