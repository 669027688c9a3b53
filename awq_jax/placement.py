"""Where the parts of a packed weight lie on a mesh."""

import dataclasses
from typing import Literal

from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
