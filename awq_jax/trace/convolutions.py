"""Convolutions that are matmuls: windows of one element, windows that tile the input, and one that covers it."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from awq_jax.trace.jaxpr import Op


def as_matmul(op: Op) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """``(input, kernel) -> result`` with a matmul in place of the convolution ``op``; None if it is none.

    The window has one element along an axis (the stride may skip some), or is as long as its stride, or as the input.
    """
    p = op.params
    dims, strides = p["dimension_numbers"], tuple(p["window_strides"])
    lhs, rhs = op.ins[0].shape, op.ins[1].shape
    plain = (
        all(n == 1 for n in (*p["lhs_dilation"], p["feature_group_count"], p["batch_group_count"]))
        and all(low == high == 0 for low, high in p["padding"])
        and all(rhs[a] == 1 or d == 1 for a, d in zip(dims.rhs_spec[2:], p["rhs_dilation"], strict=True))
    )
    if not plain:
        return None
    windows = [rhs[a] for a in dims.rhs_spec[2:]]
    sizes = [lhs[a] for a in dims.lhs_spec[2:]]
    outs = [op.outs[0].shape[a] for a in dims.out_spec[2:]]
    if any(w not in (1, s) and w != n for w, s, n in zip(windows, strides, sizes, strict=True)):
        return None
    kind = p.get("preferred_element_type") or op.outs[0].dtype
    n = len(windows)

    def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
        x = jnp.transpose(x, (dims.lhs_spec[0], *dims.lhs_spec[2:], dims.lhs_spec[1]))
        for d, (window, stride, out) in enumerate(zip(windows, strides, outs, strict=True)):
            if out > 1:
                step = stride if window == 1 else 1
                x = jax.lax.slice_in_dim(x, 0, (out - 1) * stride + window, step, d + 1)
            else:
                x = jax.lax.slice_in_dim(x, 0, window, 1, d + 1)
        shape = [size for out, window in zip(outs, windows, strict=True) for size in (out, window)]
        x = x.reshape(x.shape[0], *shape, x.shape[-1])
        w = jnp.transpose(w, (*dims.rhs_spec[2:], dims.rhs_spec[1], dims.rhs_spec[0]))
        inner = [2 + 2 * d for d in range(n)]
        contract = ((*inner, 2 * n + 1), tuple(range(n + 1)))
        y = jax.lax.dot_general(x, w, (contract, ((), ())), p["precision"], kind)
        places = (dims.out_spec[0], *dims.out_spec[2:], dims.out_spec[1])
        order = sorted(range(n + 2), key=lambda i: places[i])
        return jnp.transpose(y, order).astype(op.outs[0].dtype)

    return matmul if math.prod(rhs) > 1 else None
