"""Parts and slices of packed weights, as the program takes them of the float leaf."""

import dataclasses
from typing import Any

import jax
from jax.typing import ArrayLike

from awq_jax.pack import Array
from awq_jax.qtensor import QuantizedTensor
from awq_jax.trace.views import Window


def index_batch(q: QuantizedTensor, axis: int, i: ArrayLike) -> QuantizedTensor:
    """Slice ``i``, which may be traced, along the batch axis that is axis ``axis`` of the leaf as ``q`` has it."""
    axes = q.live_axes
    at = axes[:axis].count("b")

    def one(a: Array) -> jax.Array:
        if isinstance(i, int):
            return jax.lax.index_in_dim(a, i, at, keepdims=False)
        return jax.lax.dynamic_index_in_dim(a, i, at, keepdims=False)

    return dataclasses.replace(jax.tree.map(one, q), axes=axes[:axis] + axes[axis + 1 :])


def can_cut(q: QuantizedTensor, window: Window) -> bool:
    """Whether `cut` can take this part: of rows, only whole groups and words of one contracted axis."""
    if all(n == size for n, (_, size) in zip(q.shape, window, strict=True)):
        return True
    if q.layout != "canonical" or q.placement is not None:
        return False
    for axis, (start, size), n in zip(q.live_axes, window, q.shape, strict=True):
        if axis == "k" and (start, size) != (0, n):
            whole = (start + size == n) or size % q.group_size == 0
            words = start * q.bits % 32 == 0 and (size * q.bits % 32 == 0 or start + size == n)
            if len(q.k_dims) > 1 or start % q.group_size or not whole or not words or q.perm is not None:
                return False
    return True


def cut(q: QuantizedTensor, window: Window) -> QuantizedTensor:
    """The part of ``q`` that begins at ``window[d][0]`` and has ``window[d][1]`` elements along axis ``d``."""
    axes = q.live_axes
    parts = {r: [w for w, a in zip(window, axes, strict=True) if a == r] for r in "bkn"}
    (rows,) = parts["k"] if len(parts["k"]) == 1 else [(0, q.k)]
    units = {"qweight": q.group_size, "scales": q.group_size, "zeros": q.group_size, "offsets": q.group_size}

    def span(name: str, a: Array) -> tuple[int, int]:
        """Of rows, as the array ``name`` has them."""
        if rows[1] == q.k:
            return 0, a.shape[-2]
        unit = 32 / q.bits if name == "qweight" else units[name]
        low = int(rows[0] / unit)
        high = a.shape[-2] if rows[0] + rows[1] == q.k else int((rows[0] + rows[1]) / unit)
        return low, high - low

    def one(name: str) -> Array | None:
        a = getattr(q, name)
        if a is None:
            return None
        wide = a.reshape(*a.shape[:-1], *q.n_dims) if name in units else a
        at = [*parts["b"], span(name, a), *parts["n"]] if name in units else [*parts["b"], rows]
        wide = wide[tuple(slice(start, start + size) for start, size in at)]
        return wide.reshape(*wide.shape[: a.ndim - 1], -1) if name in units else wide

    arrays: dict[str, Any] = {name: one(name) for name in (*units, "inv_scale", "perm")}
    return dataclasses.replace(
        q,
        **arrays,
        axes=axes,
        k_dims=tuple(size for _, size in parts["k"]),
        n_dims=tuple(size for _, size in parts["n"]),
    )
