"""A leaf whose parts are weights of several matmuls: each is quantized by itself, and they are stored as one."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from awq_jax import pack
from awq_jax.config import LeafConfig
from awq_jax.plan.plan import Site
from awq_jax.qtensor import QuantizedTensor, split_shape

GROUPED = ("qweight", "scales", "zeros")


def whole_only(site: Site) -> bool:
    """Whether an explicit scale cannot be kept: other columns, or rows, of the leaf may read another activation."""
    return any(a in "kn" and w != (0, n) for a, w, n in zip(site.axes, site.part, site.shape, strict=False))


def problem(sites: Sequence[Site], leaf: LeafConfig) -> str:
    """Why the parts of one leaf cannot be stored as one packed weight, "" if they can."""
    if not any(s.part for s in sites):
        return ""
    first = sites[0]
    if sum(math.prod(s.part_shape) for s in sites) != math.prod(first.shape):
        return "a part of it is read by no matmul"
    rows = [d for d, a in enumerate(first.axes) if a == "k"]
    for s in sites:
        for d in rows:
            start, size = s.part[d] if s.part else (0, s.shape[d])
            if (start, size) == (0, s.shape[d]):
                continue
            if len(rows) > 1:
                return "matmuls read some of the rows that several of its axes make"
            g, bits = leaf.group_size, leaf.bits
            last = start + size == s.shape[d]
            if g == -1 or start % g or start * bits % 32 or (not last and (size % g or size * bits % 32)):
                return f"a matmul reads its rows {start} to {start + size - 1}, which are no whole groups of {g}"
    return ""


def join(sites: Sequence[Site], packed: Mapping[str, QuantizedTensor]) -> QuantizedTensor:
    """The packed leaf.

    Args:
      sites: all of one leaf; they do not overlap, and cover it.
      packed: by the name of the site.
    """
    if len(sites) == 1 and not sites[0].part:
        return packed[sites[0].name]
    first, axes = packed[sites[0].name], sites[0].canonical_axes
    batch, k_dims, n_dims = split_shape(sites[0].shape, axes)
    k, g = math.prod(k_dims), first.group_size
    heights = {"qweight": pack.words(-(-k // g) * g, first.bits), "scales": -(-k // g), "zeros": -(-k // g)}
    arrays: dict[str, np.ndarray | None] = {}
    for name in GROUPED:
        if getattr(first, name) is None:
            arrays[name] = None
            continue
        dtype = np.result_type(*(getattr(packed[s.name], name).dtype for s in sites))
        out = np.zeros((*batch, heights[name], *n_dims), dtype)
        for s in sites:
            a = np.asarray(getattr(packed[s.name], name))
            parts = {r: [w for w, x in zip(_window(s), axes, strict=True) if x == r] for r in "bkn"}
            start = parts["k"][0][0] * (first.bits / 32 if name == "qweight" else 1 / g) if len(k_dims) == 1 else 0
            at = [*parts["b"], (int(start), a.shape[-2]), *parts["n"]]
            window = tuple(slice(low, low + size) for low, size in at)
            out[window] = a.reshape(out[window].shape)
        arrays[name] = out.reshape(*batch, heights[name], -1)
    inverse = None
    if any(packed[s.name].inv_scale is not None for s in sites):
        inverse = np.ones((*batch, k), np.float32)
        for s in sites:
            own = packed[s.name].inv_scale
            if own is not None:
                spans = [w for w, x in zip(_window(s), axes, strict=True) if x == "b"]
                inverse[tuple(slice(low, low + size) for low, size in spans)] = np.asarray(own)
    tables: dict[str, Any] = {name: None if a is None else jax.device_put(a) for name, a in arrays.items()}
    return dataclasses.replace(
        first,
        **tables,
        inv_scale=None if inverse is None else jax.device_put(inverse),
        k_dims=k_dims,
        n_dims=n_dims,
    )


def _window(site: Site) -> tuple[tuple[int, int], ...]:
    return site.part or tuple((0, n) for n in site.shape)
