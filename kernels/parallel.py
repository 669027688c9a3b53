"""Packed weights on a mesh: every device runs its kernel on its own part (`jax.shard_map`).

A custom call cannot be cut by the compiler, which would gather the weight instead; so it is cut here, and
the kernels see the shapes of one device. Sums over devices are taken in float32, as those within one are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath
from jax.typing import DTypeLike

from awq_jax.placement import TABLES, Placement
from awq_jax.qtensor import QuantizedTensor, is_quantized

T = TypeVar("T")


def specs(q: QuantizedTensor, place: Placement) -> QuantizedTensor:
    """``q`` with a `PartitionSpec` in place of each array; its other fields are those of ``q``."""
    dim, axis, lead = place.dim, place.axis, len(q.batch)
    names: dict[str, tuple[str, ...]] = dict.fromkeys(("qweight", "scales", "zeros", "offsets"), ("k", "n"))
    names |= {"inv_scale": ("k",), "perm": ("k",)}
    if q.layout == "cuda":
        names["qweight"] = ("n", "k")

    def spec(own: tuple[str, ...]) -> P:
        roles = ("b", *("",) * (lead - 1), *own) if lead else own
        return P(*(axis if dim and role == dim else None for role in roles))

    found: dict[str, Any] = {f: spec(own) for f, own in names.items() if getattr(q, f) is not None}
    return dataclasses.replace(q, **found)


def shardings(q: QuantizedTensor, place: Placement) -> QuantizedTensor:
    """As `specs`, with shardings on the mesh."""
    tree = specs(q, place)
    found: dict[str, Any] = {f: place.sharding(s) for f in TABLES if (s := getattr(tree, f)) is not None}
    return dataclasses.replace(tree, **found)


def local(q: QuantizedTensor) -> QuantizedTensor:
    """What one device sees of a placed weight inside `jax.shard_map`: a smaller weight without a placement."""
    place = q.placement
    if place is None:
        return q
    k_dims = (q.k // place.size,) if place.dim == "k" else q.k_dims
    n_dims = (q.n // place.size,) if place.dim == "n" else q.n_dims
    axes = q.axes
    if place.dim in ("k", "n"):  # several axes may have been one cut together
        for role, dims in (("k", k_dims), ("n", n_dims)):
            first = axes.index(role)
            if len(dims) < axes.count(role):
                axes = axes[: first + 1] + axes[first + 1 :].replace(role, "")
    return dataclasses.replace(q, k_dims=k_dims, n_dims=n_dims, axes=axes, placement=None)


def matmul(x: jax.Array, q: QuantizedTensor, run: Callable[..., jax.Array], out_dtype: DTypeLike) -> jax.Array:
    """``x [*B, ..., K]`` times a placed weight.

    Args:
      x: float; each device needs the part that goes with its rows of the weight, or all of it.
      q: with a `Placement`.
      run: ``(x, q, preferred_element_type=dtype) -> [*B, ..., N]`` on one device.
      out_dtype: dtype of the result.

    Returns:
      ``[*B, ..., N]``: cut along N, or along the first axis, as the weight is; else, and if it is to be
      gathered, the same on all devices.
    """
    place = q.placement
    assert place is not None
    summed = place.dim == "k"

    def own(x: jax.Array, q: QuantizedTensor) -> jax.Array:
        own_dtype = jnp.promote_types(out_dtype, jnp.float32) if summed else out_dtype
        y = run(x, local(q), preferred_element_type=own_dtype)
        return lax.psum(y, place.axis).astype(out_dtype) if summed else y

    def cut_at(dim: str) -> P:
        """Of an array whose last axis is cut if the weight is along ``dim``."""
        if place.dim == dim:
            return P(*[None] * (x.ndim - 1), place.axis)
        return P(place.axis) if place.dim == "b" else P()

    y = jax.shard_map(own, mesh=place.mesh, in_specs=(cut_at("k"), specs(q, place)), out_specs=cut_at("n"))(x, q)
    return lax.with_sharding_constraint(y, place.sharding(P())) if place.gather else y


def on_each(f: Callable[[QuantizedTensor], QuantizedTensor], q: QuantizedTensor) -> QuantizedTensor:
    """``f`` of each device's part of a placed weight: a change of layout, say, which has to fit each part."""
    place = q.placement
    assert place is not None
    after = jax.eval_shape(f, dataclasses.replace(q, placement=None))  # for what arrays there are
    leaves = jax.tree.leaves(specs(after, place), is_leaf=lambda s: isinstance(s, P))

    def own(q: QuantizedTensor) -> list[jax.Array]:
        return jax.tree.leaves(f(local(q)))

    arrays = jax.shard_map(own, mesh=place.mesh, in_specs=(specs(q, place),), out_specs=leaves)(q)
    return dataclasses.replace(jax.tree.unflatten(jax.tree.structure(after), arrays), placement=place)


def varying(a: jax.Array) -> frozenset[str]:
    """The mesh axes of the enclosing shard_map along which ``a`` differs."""
    kind: Any = jax.typeof(a)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def vary_as(y: jax.Array, *arrays: object) -> jax.Array:
    """``y``, which inside shard_map does not say that it differs along the mesh axes of ``arrays``, says so."""
    axes = frozenset().union(*(varying(a) for a in arrays if isinstance(a, jax.Array)))
    missing = tuple(axes - varying(y))
    return lax.pcast(y, missing, to="varying") if missing else y


def sum_as(dx: jax.Array, x: jax.Array) -> jax.Array:
    """The cotangent of ``x``, summed over the mesh axes along which it differs and ``x`` does not."""
    extra = tuple(varying(dx) - varying(x))
    return lax.psum(dx, extra) if extra else dx


def summed(
    run: Callable[..., jax.Array], params: T, cut: Callable[[KeyPath, jax.Array], P], place: Placement, *args: jax.Array
) -> jax.Array:
    """``run(params, *args)`` on every device with its part of ``params``, and the sum of what they give.

    Args:
      run: called with parts: packed weights without a placement, arrays as they are cut.
      params: a pytree with placed weights.
      cut: ``(key path, array) -> PartitionSpec`` for its other arrays.
      place: the mesh; where its ``dim`` is empty all devices do the same, and nothing is summed.
      *args: the same on all devices.
    """

    def own(params: T, *args: jax.Array) -> jax.Array:
        y = run(jax.tree.map(lambda q: local(q) if is_quantized(q) else q, params, is_leaf=is_quantized), *args)
        return lax.psum(y, place.axis) if place.dim else y

    def spec(path: KeyPath, leaf: jax.Array | QuantizedTensor) -> P | QuantizedTensor:
        if not isinstance(leaf, QuantizedTensor):
            return cut(path, leaf)
        assert leaf.placement is not None
        return specs(leaf, leaf.placement)

    in_specs = jax.tree_util.tree_map_with_path(spec, params, is_leaf=is_quantized)
    # Unchecked: the branches of a scan over tiles of rows differ in what they vary over.
    return jax.shard_map(
        own, mesh=place.mesh, in_specs=(in_specs, *(P() for _ in args)), out_specs=P(), check_vma=False
    )(params, *args)
