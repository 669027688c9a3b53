"""Leaves as the quantizer works on them: ``[S, E, K, N]``.

S counts scanned layers (1 without a scan), E the experts with an activation of their own (or 1),
K the contracted rows, N the output columns.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from awq_jax.plan import Group
from awq_jax.qtensor import split_shape, to_canonical
from awq_jax.select import Target


def from_leaf(leaf: Any, target: Target, group: Group) -> jax.Array:
    """Float leaf to float32 ``[S, E, K, N]``; experts that share one activation become more columns."""
    w = to_canonical(jnp.asarray(leaf).astype(jnp.float32), target.site.canonical_axes)
    k, n = w.shape[-2:]
    s = math.prod(group.scan)
    if group.batch:
        return w.reshape(s, math.prod(group.batch), k, n)
    return jnp.moveaxis(w.reshape(s, -1, k, n), 1, 2).reshape(s, 1, k, -1)


def to_batched(a: jax.Array, target: Target, group: Group) -> jax.Array:
    """``[S, E, R, N]`` (R rows of codes, scales or zeros) to ``[*batch axes of the leaf, R, N]``."""
    batch, _, n_dims = split_shape(target.site.shape, target.site.canonical_axes)
    n, rows = math.prod(n_dims), a.shape[2]
    if group.batch:
        return a.reshape(*batch, rows, n)
    own = math.prod(batch) // math.prod(group.scan)
    return jnp.moveaxis(a.reshape(a.shape[0], rows, own, n), 2, 1).reshape(*batch, rows, n)


def scale_to_batched(scale: jax.Array, target: Target, group: Group) -> jax.Array:
    """``[*scan, *batch, K]`` to ``[*batch axes of the leaf, K]``."""
    batch, _, _ = split_shape(target.site.shape, target.site.canonical_axes)
    lead = (*group.scan, *group.batch)
    return jnp.broadcast_to(
        scale.reshape(*lead, *(1,) * (len(batch) - len(lead)), group.channels), (*batch, group.channels)
    )


def pad_rows(w: jax.Array, rows: int) -> jax.Array:
    """Zero rows appended to ``w [..., K, N]``."""
    return jnp.pad(w, [(0, 0)] * (w.ndim - 2) + [(0, rows - w.shape[-2]), (0, 0)])


def pad_square(gram: jax.Array, rows: int) -> jax.Array:
    """Channels without energy appended to ``gram [..., K, K]``."""
    extra = rows - gram.shape[-1]
    return jnp.pad(gram, [(0, 0)] * (gram.ndim - 2) + [(0, extra), (0, extra)])


def pad_channels(v: jax.Array, rows: int, value: float) -> jax.Array:
    """``value`` appended to ``v [..., K]``."""
    return jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, rows - v.shape[-1])], constant_values=value)
