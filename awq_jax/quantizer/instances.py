"""From ``[S, E, K, N]``, as the quantizer works on weights, back to the axes of the leaf.

S counts scanned layers (1 without a scan), E the experts with an activation of their own (or 1),
K the contracted rows, N the output columns.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.plan.plan import Group
from awq_jax.qtensor import split_shape
from awq_jax.quantizer.targets import Target


def to_batched(a: np.ndarray, target: Target, group: Group) -> np.ndarray:
    """``[S, E, R, N]`` (R rows of codes, scales or zeros) to ``[*batch axes of the leaf, R, N]``."""
    batch, _, n_dims = split_shape(target.site.shape, target.site.canonical_axes)
    n, rows = math.prod(n_dims), a.shape[2]
    if group.batch:
        return a.reshape(*batch, rows, n)
    own = math.prod(batch) // math.prod(group.scan)
    return np.moveaxis(a.reshape(a.shape[0], rows, own, n), 2, 1).reshape(*batch, rows, n)


def scale_to_batched(scale: jax.Array, target: Target, group: Group) -> jax.Array:
    """``[*scan, *batch, K]`` to ``[*batch axes of the leaf, K]``."""
    batch, _, _ = split_shape(target.site.shape, target.site.canonical_axes)
    lead = (*group.scan, *group.batch)
    return jnp.broadcast_to(
        scale.reshape(*lead, *(1,) * (len(batch) - len(lead)), group.channels), (*batch, group.channels)
    )
