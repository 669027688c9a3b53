"""Bytes of the plug-in's linears on TPUs that are not there, at Llama 3 8B's shapes, beside the engine's own AWQ path.

    python compile_tpu_inference.py LIBTPU CHIP OUT.json

LIBTPU is the folder that libtpu is installed in: elsewhere vLLM would take this for a TPU's machine. The programs are
those of `PackedLinearMethod.apply_jax` and of the engine's `VllmAWQLinearMethod`, compiled for 1, 4 and 8 devices.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tpu_inference.layers.vllm.quantization import awq

from awq_jax.kernels import dispatch, parallel
from awq_jax.placement import Placement
from awq_jax.qtensor import QuantizedTensor
from awq_jax.vllm.linear import ON_DEVICE, PackedLinearMethod

os.environ.pop("XLA_FLAGS", None)  # the engine sets one that libtpu does not know
sys.path.append(sys.argv[1])
ROWS, GROUP = 16, 128
# Inputs, outputs, and along which a device has its part.
LAYERS = {"q": (4096, 4096, "n"), "k": (4096, 1024, "n"), "o": (4096, 4096, "k"), "gate": (4096, 14336, "n"),
          "down": (14336, 4096, "k")}  # fmt: skip


def method(place, k, n, symmetric):
    """The plug-in's, as after loading, and its arrays."""
    make = jax.ShapeDtypeStruct
    arrays = {"qweight": make((k // 8, n), jnp.uint32), "scales": make((k // GROUP, n), jnp.float16)}
    if not symmetric:
        arrays["zeros"] = make((k // GROUP, n), jnp.bfloat16)
    own = object.__new__(PackedLinearMethod)
    own.prefix, own.in_features, own.sizes, own.output_shape = "", k, (n,), (n,)
    own.weight = QuantizedTensor(
        None, None, None, None, 4, GROUP, "kn", (k,), (n,), "float32", placement=place
    )  # fmt: skip
    whole = QuantizedTensor(
        *(arrays.get(a) for a in ON_DEVICE), None, 4, GROUP, "kn", (k,), (n,), "float32", placement=place
    )
    return own, arrays, {name: getattr(parallel.shardings(whole, place), name) for name in arrays}


def packed(mesh, symmetric):
    """One program with all layers, and its arguments."""
    made, given, where, xs, at = {}, {}, {}, {}, {}
    for name, (k, n, dim) in LAYERS.items():
        place = Placement(mesh, "model", dim if mesh.size > 1 else "")
        made[name], given[name], where[name] = method(place, k, n, symmetric)
        xs[name] = jax.ShapeDtypeStruct((ROWS, k), jnp.bfloat16)
        at[name] = NamedSharding(mesh, P(None, "model") if dim == "k" else P())

    def run(weights, xs):
        def layer(name):
            return SimpleNamespace(bias=None, **{f"packed_{a}": w for a, w in weights[name].items()})

        return {name: made[name].apply_jax(layer(name), xs[name]) for name in made}

    return run, (given, xs), (where, at)


def engines_own(mesh):
    """The same of the engine's AWQ, on one device: its weights are uint4 there."""

    given, xs = {}, {}
    for name, (k, n, _) in LAYERS.items():
        groups, make = k // GROUP, jax.ShapeDtypeStruct
        given[name] = {"qweight": make((groups, GROUP, n), jnp.uint4), "qzeros": make((groups, n), jnp.uint4),
                       "scales": make((groups, n), jnp.bfloat16)}  # fmt: skip
        xs[name] = make((ROWS, k), jnp.bfloat16)

    def run(weights, xs):
        found = {}
        for name, (_, n, _) in LAYERS.items():
            own = object.__new__(awq.VllmAWQLinearMethod)
            own.linear_config = SimpleNamespace(fuse_matmuls=True, output_sizes=[n], n_shards=1)
            layer = SimpleNamespace(**weights[name])
            found[name] = own._apply_fused(layer, xs[name])
        return found

    place = NamedSharding(mesh, P())
    return run, (given, xs), (place, place)


def compiled(run, arguments, where):
    try:
        program = jax.jit(run, in_shardings=where).lower(*arguments).compile()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:600]}
    memory = program.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "kernels": program.as_text().count('custom_call_target="tpu_custom_call"'),
    }


def main() -> None:
    from jax.experimental import topologies

    awq.jax_view = awq.torch_view = lambda array: array  # its layers are PyTorch's, whose tensors are views of arrays
    dispatch.platform_of = lambda x: "tpu"  # of what is traced, it would say where this runs
    name = {"v5e": "v5e:2x4", "v6e": "v6e:2x4"}[sys.argv[2]]
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    rows = []
    for count in (1, 4, 8):
        mesh = jax.sharding.Mesh(devices[:count].reshape(1, count), ("data", "model"))
        activations = sum(ROWS * (k // count if dim == "k" else k) * 2 for k, _, dim in LAYERS.values())
        for symmetric in (False, True):
            zeros = 0 if symmetric else 4  # bits, in a file
            file = sum(k * n // 2 + k // GROUP * n * (16 + zeros) // 8 for k, n, _ in LAYERS.values()) / count
            row = {"path": "awq_jax", "chip": sys.argv[2], "devices": count, "symmetric": symmetric, "file": file}
            rows.append(row | {"activations": activations} | compiled(*packed(mesh, symmetric)))
            print(rows[-1], flush=True)
        if count == 1:
            row = {"path": "the engine's AWQ", "chip": sys.argv[2], "devices": 1, "symmetric": False}
            rows.append(row | {"file": rows[0]["file"], "activations": activations} | compiled(*engines_own(mesh)))
            print(rows[-1], flush=True)
    Path(sys.argv[3]).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
