"""Compiles the quantizer's programs for devices that are not here, and reads off what memory they take.

Nothing runs and nothing is allocated: arguments are shapes. For CUDA the plugin's wheels are needed and a private
way into them (``tests/helpers/cuda_hlo.py`` has the description of the GPU); without them it is XLA's CPU compiler that
answers, which is another compiler: the result says which it was.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

TESTS = Path(__file__).parents[1] / "tests" / "helpers"


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of one program on one device.

    Attributes:
      arguments, outputs, temporaries: as XLA counts them.
      shared: of the outputs, what lies where a donated argument was.
    """

    arguments: int
    outputs: int
    temporaries: int
    shared: int

    @property
    def made(self) -> int:
        """What it takes besides its arguments."""
        return self.outputs - self.shared + self.temporaries


class Compiler:
    """For ``count`` devices.

    Attributes:
      name: of what is compiled for.
      devices: that programs may be compiled for; they cannot hold anything.
    """

    def __init__(self, count: int, device_bytes: int) -> None:
        try:
            self.devices = _cuda(count, device_bytes)
            self.name = "CUDA, compute capability 9.0"
        except Exception as e:  # a private interface: absent or changed in another version
            if len(jax.devices()) < count:
                raise SystemExit(
                    f"cannot compile for CUDA ({type(e).__name__}: {e}); for {count} CPU devices set "
                    f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
                ) from e
            self.devices = tuple(jax.devices()[:count])
            self.name = f"CPU, as there is no way to compile for CUDA here ({type(e).__name__})"
        self._known: dict[str, tuple[Need, Any]] = {}
        self._here = SingleDeviceSharding(self.devices[0])

    def array(self, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        """An array on the first device."""
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=self._here)

    def tree(self, like: Any, mesh: Any = None, specs: Any = None) -> Any:
        """Shapes like those in ``like``, on the first device, or as ``specs`` say on ``mesh``."""
        if mesh is None:
            return jax.tree.map(lambda a: self.array(a.shape, a.dtype), like)
        every = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), like, every)

    def need(self, program: Callable[..., Any], *args: Any, **options: Any) -> Need:
        """Of a jitted function."""
        key = str((id(program), args, sorted(options.items())))
        if key not in self._known:
            m = program.lower(*args, **options).compile().memory_analysis()  # type: ignore[attr-defined]
            sizes = (m.argument_size_in_bytes, m.output_size_in_bytes, m.temp_size_in_bytes, m.alias_size_in_bytes)
            self._known[key] = Need(*sizes), program  # which keeps its id
        return self._known[key][0]


def _cuda(count: int, device_bytes: int) -> tuple[Any, ...]:
    sys.path.insert(0, str(TESTS))
    import cuda_hlo
    from jax.experimental import topologies
    from jaxlib import xla_client

    jax.devices()  # finds and loads the plugin
    xla = xla_client._xla
    if not xla.pjrt_plugin_initialized("cuda"):
        xla.initialize_pjrt_plugin("cuda")
    target = cuda_hlo.TARGET.replace("device_memory_size: 150000000000", f"device_memory_size: {device_bytes}")
    options = {"target_config": target, "topology": f"1x1x{count}"}
    topology = xla.get_default_c_api_topology("cuda", "H200", options)
    return tuple(topologies.TopologyDescription(topology._make_compile_only_devices()).devices)


def nbytes(tree: Mapping[str, Any] | Any) -> int:
    """Of arrays or shapes."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
