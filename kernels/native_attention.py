"""Attention of one query for each row on CPUs by compiled code, `kernels/native/attention.cc`, called by XLA."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from awq_jax.kernels import native_build
from awq_jax.kernels.exported import unless_exported

SYMBOL = "awq_attention"
MOST_DIM = 512


def obstacle(q: jax.Array, keys: jax.Array, values: jax.Array, level: str = "") -> str | None:
    """Why these arrays, see `attend`, cannot be given to it, or None if they can."""
    dtypes = {jnp.dtype(a.dtype).name for a in (q, keys, values)}
    if dtypes != {"float32"}:
        return f"it takes float32, and these are {', '.join(sorted(dtypes))}"
    dims = keys.shape[-1], values.shape[-1]
    if any(d % 16 or d > MOST_DIM for d in dims):
        return f"heads have {dims[0]} and {dims[1]} channels; it takes multiples of 16 up to {MOST_DIM}"
    found = native_build.target(SYMBOL, level)
    return found if isinstance(found, str) else None


def attend(
    q: jax.Array, keys: jax.Array, values: jax.Array, first: jax.Array, positions: jax.Array, *,
    scale: float, window: int | None, otherwise: Callable[..., jax.Array], level: str = "",
) -> jax.Array:  # fmt: skip
    """Causal attention of one query for each row over the slots from ``first``, each up to its own position.

    Args:
      q: float32 ``[B, H, D]``, without an `obstacle`, as the next two.
      keys: float32 ``[slots, KV, S, D]``.
      values: float32 ``[slots, KV, S, E]``.
      first: int32 scalar.
      positions: int32 ``[B]``; a row whose position is beyond its slot has zeros.
      scale: of the scores.
      window: tokens that a query sees, itself included; None: all.
      otherwise: the same of these five arrays, for other platforms than CPUs and for `jax.export`.
      level: the instructions to use; default: the best.

    Returns:
      ``[B, H, E]``.
    """
    found = native_build.target(SYMBOL, level)
    if isinstance(found, str):
        raise RuntimeError(found)  # `obstacle` says so first

    def here(q: jax.Array, *rest: jax.Array) -> jax.Array:
        call = jax.ffi.ffi_call(found[1], jax.ShapeDtypeStruct((*q.shape[:2], values.shape[-1]), q.dtype))
        return call(q, *rest, scale=np.float32(scale), window=np.int32(window or 0))

    def cpu(*arrays: jax.Array) -> jax.Array:
        return unless_exported(here, otherwise, *arrays)

    return lax.platform_dependent(q, keys, values, first, positions, cpu=cpu, default=otherwise)
