"""Where the parts of a packed weight lie on a mesh."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from jax.sharding import Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from awq_jax.qtensor import QuantizedTensor

Dim = Literal["k", "n", "b", ""]
TABLES = ("qweight", "scales", "zeros", "offsets", "inv_scale", "perm")  # the arrays of a packed weight


@dataclasses.dataclass(frozen=True)
class Placement:
    """A weight seen as ``[*B, K, N]``, cut into equal parts along one of its dimensions.

    Attributes:
      mesh: the devices.
      axis: the axis of the mesh along which it is cut.
      dim: what is cut: ``k`` (the products are summed over the devices), ``n`` (each device makes its own
        columns), ``b`` (the first batch axis: each device has its own experts), or nothing, every device
        having the whole.
      gather: the columns that each device makes are wanted by all of them.
    """

    mesh: Mesh
    axis: str
    dim: Dim
    gather: bool = False

    @property
    def size(self) -> int:
        """Devices along the axis."""
        return int(self.mesh.shape[self.axis])

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """``spec`` on this mesh."""
        return NamedSharding(self.mesh, spec)


def float_spec(dim: Dim, ndim: int, axis: str) -> PartitionSpec:
    """How a float weight ``[*B, K, N]`` of ``ndim`` axes lies."""
    at = {"k": ndim - 2, "n": ndim - 1, "b": 0}.get(dim)
    return PartitionSpec(*(axis if i == at else None for i in range(ndim)))


def specs(q: QuantizedTensor, place: Placement) -> QuantizedTensor:
    """``q`` with a `PartitionSpec` in place of each array; its other fields are those of ``q``."""
    dim, axis, lead = place.dim, place.axis, len(q.batch)
    names: dict[str, tuple[str, ...]] = dict.fromkeys(("qweight", "scales", "zeros", "offsets"), ("k", "n"))
    names |= {"inv_scale": ("k",), "perm": ("k",)}
    if q.layout == "cuda":
        names["qweight"] = ("n", "k")

    def spec(own: tuple[str, ...]) -> PartitionSpec:
        roles = ("b", *("",) * (lead - 1), *own) if lead else own
        return PartitionSpec(*(axis if dim and role == dim else None for role in roles))

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
