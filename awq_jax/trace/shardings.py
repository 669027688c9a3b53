"""Values on a mesh with Explicit axes, whose type names a sharding."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jax.typing import ArrayLike


def on_every_device(x: ArrayLike) -> ArrayLike:
    """``x`` without a sharding in its type: on a mesh with Explicit axes, whole on each device."""
    # What taps and packed products do to it would need a sharding to be named at each contraction and reshape.
    sharding = getattr(jax.typeof(x), "sharding", None)
    if any(axis is not None for axis in getattr(sharding, "spec", ())) and _explicit(sharding):
        return jax.sharding.reshard(jnp.asarray(x), PartitionSpec())
    return x


def as_typed(y: jax.Array, sharding: Any) -> jax.Array:
    """``y`` with the sharding that its type had in the program."""
    if sharding is None or not _explicit(sharding) or not any(axis is not None for axis in sharding.spec):
        return y
    return jax.sharding.reshard(y, sharding.spec)


def _explicit(sharding: Any) -> bool:
    return any(kind == AxisType.Explicit for kind in getattr(sharding.mesh, "axis_types", ()))
