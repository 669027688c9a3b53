"""Activations and results of matmuls as ``[*batch, T, K]`` and ``[*batch, T, N]``, axes in the order of the leaf."""

import math
from types import ModuleType
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from awq_jax.trace import views
from awq_jax.trace.jaxpr import Op


def _other_axes(op: Op) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Batch, free and contracted axes of the activation, in the dot's order."""
    contract, batch = op.dims
    pos = 0 if op.grouped is not None else op.x
    c, b = tuple(contract[pos]), tuple(batch[pos])
    rank = len(op.ins[op.x].shape)
    return b, tuple(d for d in range(rank) if d not in c and d not in b), c


def _lead(op: Op) -> tuple[views.AxisFactor, ...]:
    """The dot's batch axes; those of chosen experts in the order in which the dot has them."""
    assert op.roles is not None
    if op.grouped is not None:
        return ()
    chosen = [f for f in op.roles.b if f.axis == views.POSITION]
    strides = [math.prod(f.size for f in chosen[i + 1 :]) for i in range(len(chosen))]
    it = iter(strides)
    return tuple(f._replace(stride=next(it)) if f.axis == views.POSITION else f for f in op.roles.b)


def flatten_activation(op: Op, x: ArrayLike) -> jax.Array:
    """The activation as ``[*b, T, K]``, axes in the order of the leaf; in host memory if it is there."""
    assert op.roles is not None
    b, free, c = _other_axes(op)
    lead, k = _lead(op), op.roles.k
    xp: ModuleType = np if isinstance(x, np.ndarray) else jnp
    x = xp.transpose(x, (*b, *free, *c)).reshape(*views.sizes(lead), -1, *views.sizes(k))
    nb = len(lead)
    x = xp.transpose(x, [*views.leaf_order(lead), nb, *(nb + 1 + i for i in views.leaf_order(k))])
    sizes: dict[int, int] = {}
    for f in lead:
        sizes[f.axis] = sizes.get(f.axis, 1) * f.size
    t = math.prod(np.shape(op.ins[op.x])[d] for d in free)
    return cast(jax.Array, x).reshape(*(sizes[a] for a in sorted(sizes)), t, math.prod(views.sizes(k)))


def restore_output(op: Op, y: jax.Array) -> jax.Array:
    """``y [*b, T, N]`` in the layout and dtype of the dot's own result."""
    assert op.roles is not None
    lead, n = _lead(op), op.roles.n
    if any(f.axis == views.POSITION for f in (*lead, *n)):
        return _restore_chosen(op, y)
    nb = len(lead)
    lead_order, n_order = views.leaf_order(lead), views.leaf_order(n)
    y = y.reshape(*(lead[i].size for i in lead_order), -1, *(n[i].size for i in n_order))
    batch = [int(i) for i in np.argsort(lead_order)]
    out = [nb + 1 + int(i) for i in np.argsort(n_order)]
    rows_first = op.weight == 1 or op.grouped is not None
    y = jnp.transpose(y, [*batch, nb, *out] if rows_first else [*batch, *out, nb])
    return y.reshape(op.outs[0].shape).astype(op.outs[0].dtype)


def _restore_chosen(op: Op, y: jax.Array) -> jax.Array:
    """The same of ``y [positions * T, N]`` where each position has its own weight."""
    assert op.roles is not None
    lead, free = op.roles.b, op.roles.n
    places = [f for f in free if f.axis == views.POSITION]
    n = tuple(f for f in free if f.axis != views.POSITION)
    n_order = views.leaf_order(n)
    y = y.reshape(*views.sizes(lead), *views.sizes(tuple(places)), -1, *(n[i].size for i in n_order))
    row = len(lead) + len(places)
    stored = [n[i] for i in n_order]
    at = [len(lead) + places.index(f) if f in places else row + 1 + stored.index(f) for f in free]
    batch = range(len(lead))
    y = jnp.transpose(y, [*batch, row, *at] if op.weight == 1 else [*batch, *at, row])
    return y.reshape(op.outs[0].shape).astype(op.outs[0].dtype)
