"""Rotary position embedding (arXiv 2104.09864) and the ways checkpoints stretch its context.

Numbers follow `transformers.modeling_rope_utils`, so that a checkpoint means the same here.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.models.config import RopeConfig


def cos_sin(config: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation angles.

    Args:
      config: kind and constants.
      head_dim: channels of a head.
      positions: int32 ``[B, T]``; ``[3, B, T]`` for frames, rows and columns (see `RopeConfig.sections`).

    Returns:
      Two float32 arrays ``[B, T, 1, dims / 2]``, ``dims`` being the rotated channels.
    """
    dims = config.dims or head_dim
    factor: float | jax.Array = config.attention_factor
    if config.kind == "dynamic":
        inv_freq = _dynamic(config, dims, positions)
    elif config.kind == "longrope":
        inv_freq = _longrope(config, dims, positions)
        if config.long_attention_factor is not None:
            factor = jnp.where(_beyond(config, positions)[..., None], config.long_attention_factor, factor)
    else:
        inv_freq = jnp.asarray(inverse_frequencies(config, dims))
    turns = positions[..., None] if positions.ndim == 2 else jnp.moveaxis(positions[_axes(config, dims)], 0, -1)
    angles = turns.astype(jnp.float32) * inv_freq
    angles = angles[..., None, :]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _axes(config: RopeConfig, dims: int) -> np.ndarray:
    """By which of frame (0), row (1) and column (2) each channel pair turns: ``[dims / 2]``."""
    if not config.alternating:
        return np.repeat(np.arange(len(config.sections)), config.sections)
    axes = np.zeros(dims // 2, np.int64)
    for axis in (1, 2):
        axes[axis : 3 * config.sections[axis] : 3] = axis
    return axes


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotate channel pairs of ``x [B, T, heads, head_dim]``; keeps its dtype.

    Only as many leading channels as there are angles for are rotated. Pairs are ``(i, i + dims / 2)``,
    or neighbours if ``interleaved``.
    """
    dims = 2 * cos.shape[-1]
    x, rest = (x, None) if dims == x.shape[-1] else (x[..., :dims], x[..., dims:])
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    if interleaved:
        pairs = x.reshape(*x.shape[:-1], dims // 2, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    else:
        a, b = jnp.split(x, 2, axis=-1)
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return out if rest is None else jnp.concatenate([out, rest], axis=-1)


def inverse_frequencies(config: RopeConfig, dims: int) -> np.ndarray:
    """Radians per token of each channel pair: float32 ``[dims / 2]`` (``dynamic``: before growth)."""
    plain = config.theta ** -(np.arange(0, dims, 2) / dims)
    if config.kind == "linear":
        plain = plain / config.factor
    elif config.kind == "llama3":
        plain = _llama3(config, plain)
    elif config.kind == "yarn":
        plain = _yarn(config, plain, dims)
    return plain.astype(np.float32)


def _llama3(config: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Stretch long wavelengths, keep short ones, blend between (Llama 3.1)."""
    turns = config.original_length * plain / (2 * math.pi)  # over the original context
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (keep + (1 - keep) / config.factor)


def _yarn(config: RopeConfig, plain: np.ndarray, dims: int) -> np.ndarray:
    """Stretch by wavelength with a linear ramp over dimensions (arXiv 2309.00071, section 3.2)."""

    def dimension(turns: float) -> float:
        length = config.original_length / (turns * 2 * math.pi)
        return dims * math.log(length) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / (high - low or 0.001), 0.0, 1.0)
    return plain * (1 - ramp) + plain / config.factor * ramp


def _dynamic(config: RopeConfig, dims: int, positions: jax.Array) -> jax.Array:
    """NTK scaling: beyond the original context the base grows with each row's length; ``[B, 1, dims / 2]``."""
    length = jnp.maximum(positions.max(axis=-1) + 1, config.original_length).astype(jnp.float32)
    stretch = config.factor * length / config.original_length - (config.factor - 1)
    base = config.theta * stretch ** (dims / (dims - 2))
    exponent = jnp.arange(0, dims, 2, dtype=jnp.float32) / dims
    return base[:, None, None] ** -exponent


def _longrope(config: RopeConfig, dims: int, positions: jax.Array) -> jax.Array:
    """Two sets of stretched wavelengths, picked by each row's length (arXiv 2402.13753); ``[B, 1, dims / 2]``."""
    plain = inverse_frequencies(config, dims)
    short, long = (jnp.asarray(plain / np.asarray(f, np.float32)) for f in (config.short_factors, config.long_factors))
    return jnp.where(_beyond(config, positions), long, short)


def _beyond(config: RopeConfig, positions: jax.Array) -> jax.Array:
    """Which rows are longer than the original context; bool ``[B, 1, 1]``."""
    return (positions.max(axis=-1) + 1 > config.original_length)[:, None, None]
