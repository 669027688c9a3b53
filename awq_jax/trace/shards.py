"""Inside a `shard_map`: weights of which each device has a part, and activations that a tap wants whole.

A device multiplies by its part of the packed arrays: whole experts, columns of the first output axis, or whole groups
of rows of the first contracted one. Where a spec cuts otherwise, the weight is made float outside and cut then.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from awq_jax.kernels.parallel import varying
from awq_jax.qtensor import QuantizedTensor
from awq_jax.trace import views
from awq_jax.trace.jaxpr import Op
from awq_jax.trace.views import View

ROWS = ("qweight", "scales", "zeros", "offsets")  # `[*batch, rows, N]`


def names_of(entry: Any) -> tuple[str, ...]:
    """Axes of the mesh in one entry of a spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def specs_of(q: QuantizedTensor, outer: View, inner: View) -> QuantizedTensor | None:
    """Specs for the arrays of a packed leaf, seen as ``outer`` outside and as ``inner`` inside; None: not cut."""
    live = [d for d in range(len(outer.shape)) if d not in outer.scanned]
    cut = {live.index(axis): names for axis, names in inner.shards if (axis, names) not in outer.shards}
    if cut and (outer.window or len(q.live_axes) != len(live)):
        return None
    return array_specs(q, {at: (names, outer.shape[live[at]] // inner.shape[live[at]]) for at, names in cut.items()})


def array_specs(q: QuantizedTensor, cut: Mapping[int, tuple[tuple[str, ...], int]]) -> QuantizedTensor | None:
    """Specs for the arrays of a packed leaf of which axes are cut; None: its arrays cannot be cut so.

    Args:
      q: packed leaf.
      cut: axis of the leaf as ``q.live_axes`` has it -> the axes of the mesh that split it, and into how many parts.
    """
    if not cut:
        return jax.tree.map(lambda a: PartitionSpec(), q)
    axes = q.live_axes
    first = {role: axes.index(role) for role in "kn"}
    if q.layout != "canonical" or q.placement is not None:
        return None
    if any((axes[at] != "b" and at != first[axes[at]]) or q.shape[at] % count for at, (_, count) in cut.items()):
        return None
    lead = [cut[at][0] if at in cut else None for at, role in enumerate(axes) if role == "b"]
    rows, columns = (cut[first[role]][0] if first[role] in cut else None for role in "kn")
    if rows:
        part = q.k // cut[first["k"]][1]
        if q.perm is not None or part % q.group_size or part * q.bits % 32:
            return None

    def one(name: str) -> PartitionSpec | None:
        if getattr(q, name) is None:
            return None
        return PartitionSpec(*lead, rows, columns) if name in ROWS else PartitionSpec(*lead, rows)

    arrays: dict[str, Any] = {name: one(name) for name in (*ROWS, "inv_scale", "perm")}
    return dataclasses.replace(q, **arrays)


def placed_as(q: QuantizedTensor, leaf: object) -> QuantizedTensor:
    """``q`` on the devices of ``leaf``, cut as it is as far as whole experts, columns and groups of rows go."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return q
    spec = [names_of(entry) for entry in sharding.spec]
    counts = {at: (names, math.prod(sharding.mesh.shape[a] for a in names)) for at, names in enumerate(spec) if names}
    kept: dict[int, tuple[tuple[str, ...], int]] = {}
    for at, names in counts.items():
        if array_specs(q, kept | {at: names}) is not None:
            kept[at] = names
    specs = array_specs(q, kept)
    return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(sharding.mesh, s)), q, specs)


def local(q: QuantizedTensor, inner: View) -> QuantizedTensor:
    """A device's part of ``q``, whose arrays are a part already, with its own sizes."""
    live = [d for d in range(len(inner.shape)) if d not in inner.scanned]
    sizes = {role: tuple(inner.shape[d] for d, a in zip(live, q.live_axes, strict=True) if a == role) for role in "kn"}
    return dataclasses.replace(q, k_dims=sizes["k"], n_dims=sizes["n"])


def whole(
    op: Op, view: View, x: jax.Array, options: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array], int]:
    """An activation ``[*b, T, K]`` with the channels and experts of all devices, and on how many there is the same.

    ``options``, which come back: ``expert``, a device's numbers of experts, as their numbers among all.
    """
    assert op.roles is not None
    count = 1
    if not view.shards:
        return x, options, count
    if (expert := options.get("expert")) is not None:
        axis = view.axes[op.grouped.group][0].axis if op.grouped is not None else view.choice.axis  # type: ignore[union-attr]
        options = {"expert": jnp.where(expert >= 0, expert + first_expert(view, axis), -1)}
    lead = sorted({f.axis for f in op.roles.b if f.axis != views.POSITION})
    rows = sorted({f.axis for f in op.roles.k})
    sizes = [math.prod(f.size for f in op.roles.k if f.axis == axis) for axis in rows]
    for axis, names in view.shards:
        if axis in lead and op.grouped is None and view.choice is None:
            x = jax.lax.all_gather(x, names, axis=lead.index(axis), tiled=True)
        elif axis in rows:
            x = x.reshape(*x.shape[:-1], *sizes)
            at = x.ndim - len(rows) + rows.index(axis)
            x = jax.lax.all_gather(x, names, axis=at, tiled=True)
            sizes[rows.index(axis)] = x.shape[at]
            x = x.reshape(*x.shape[: x.ndim - len(rows)], math.prod(sizes))
        else:
            continue
        count *= math.prod(jax.lax.axis_size(name) for name in names)
    return x, options, count


def first_expert(view: View, axis: int) -> ArrayLike:
    """The number among all of this device's first expert."""
    for cut, names in view.shards:
        if cut == axis:
            return jax.lax.axis_index(names) * view.shape[axis]
    return 0


def summed(tapped: object, manual: Sequence[str], checked: bool, count: int) -> object:
    """The sum over the devices of a shard_map, as far as their values differ; ``count``: how many have the same."""

    def one(a: jax.Array) -> jax.Array:
        axes = tuple(x for x in manual if x in varying(a)) if checked else tuple(manual)
        a = jax.lax.psum(a, axes) if axes else a
        return a if count == 1 else (a / count).astype(a.dtype)

    return jax.tree.map(one, tapped)
