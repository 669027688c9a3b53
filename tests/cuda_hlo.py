"""Compiles the XLA form of the packed product for an H200 that is not here; a process of its own.

Needs the CUDA plugin's wheels, not a GPU, and a private way into them: it prints JSON, ``{"skip": reason}`` where
that way is closed, else for each case the arrays that the compiled program writes outside of fusions.
"""

import dataclasses
import functools
import json
import os
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

TARGET = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000
l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "NVIDIA H200" """
K, N = 2048, 4096


def sharding():
    """On one H200 that can only be compiled for."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from jaxlib import xla_client

    jax.devices()  # finds and loads the plugin
    xla = xla_client._xla
    if not xla.pjrt_plugin_initialized("cuda"):
        xla.initialize_pjrt_plugin("cuda")
    topology = xla.get_default_c_api_topology("cuda", "H200", {"target_config": TARGET, "topology": "1x1x1"})
    devices = topologies.TopologyDescription(topology._make_compile_only_devices()).devices
    return NamedSharding(Mesh(np.array(devices[:1]), ("d",)), PartitionSpec())


def written(text: str) -> list[tuple[str, int]]:
    """(dtype, elements) of the arrays that the instructions of the entry computation leave in memory."""
    entry = text[text.index("\nENTRY") :]
    found = re.findall(r"^\s+(?:ROOT )?%\S+ = (\(?[^=]*?\)?) (?:fusion|custom-call|copy|dot|convert)\(", entry, re.M)
    arrays = []
    for shapes in found:
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            size = 1
            for d in filter(None, dims.split(",")):
                size *= int(d)
            arrays.append((dtype, size))
    return arrays


def memory(where, kind: str, layers: int) -> dict[str, int]:
    """Bytes that a decode step of a model of Llama 2's shape needs besides weights and cache; and of one weight."""
    from unittest import mock

    import jax
    import jax.numpy as jnp

    from awq_jax import kernels
    from awq_jax.bench import decoding, random_models
    from awq_jax.generate import Generator
    from awq_jax.kernels import dispatch, tuned
    from awq_jax.models import params as model_params
    from awq_jax.models.decoder import init_cache

    def abstract(*make):
        tree = jax.eval_shape(*make)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree)

    c = dataclasses.replace(random_models.config("llama-2-7b", layers), vocab_size=1024)

    def make():
        params = random_models.random_model(c, "bfloat16")[1]
        return kernels.prepare(params, "cuda") if kind == "triton" else params

    params, cache = abstract(make), abstract(lambda: init_cache(c, 1, 64, jnp.bfloat16))
    one, options = jnp.zeros(1, jnp.int32), (jax.random.key(0), jnp.float32(0), jnp.int32(0), jnp.float32(1))
    token, options = abstract(lambda: one), abstract(lambda: options)
    h200 = tuned.Chip("NVIDIA H200", 90, 132)
    here = mock.patch.object(tuned, "local_chip", return_value=h200)
    with here, mock.patch.object(dispatch, "_platform", return_value="cuda"):
        step = Generator(model_params.abstract(c)[0], c).step.lower(
            params, cache, token, token, *options, mode="greedy"
        )
    assert ("triton_kernel_call" in step.as_text()) == (kind == "triton")
    temp = step.compile().memory_analysis().temp_size_in_bytes
    return {"temp": temp, "tile": decoding.largest_tile(params)}


def main() -> None:
    try:
        where = sharding()
    except Exception as e:  # a private interface: absent or changed in another version
        print(json.dumps({"skip": f"{type(e).__name__}: {e}"[:300]}))
        return
    import jax
    import jax.numpy as jnp

    from awq_jax.kernels import layout, xla
    from awq_jax.qtensor import QuantizedTensor

    def abstract(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    out = {}
    for kind in ("canonical", "cuda"):
        words = (N, layout.words(K, 4)) if kind == "cuda" else (K // 8, N)
        q = QuantizedTensor(
            abstract(words, jnp.uint16 if kind == "cuda" else jnp.uint32), abstract((K // 128, N), jnp.bfloat16),
            abstract((K // 128, N), jnp.uint8), None, 4, 128, "kn", (K,), (N,), "bfloat16", layout=kind,
        )  # fmt: skip
        for form, m in (("grouped", 2), ("grouped", 16), ("grouped", 64), ("dequantize", 64)):
            run = jax.jit(functools.partial(getattr(xla, form), out_dtype=jnp.bfloat16), out_shardings=where)
            text = run.lower(abstract((m, K), jnp.bfloat16), q).compile().as_text()
            out[f"{form} {m} {kind}"] = written(text)
    steps = {f"{kind} {layers}": memory(where, kind, layers) for kind in sys.argv[1:] for layers in (3, 5)}
    print(json.dumps({"K": K, "N": N, "cases": out, "steps": steps}))


if __name__ == "__main__":
    sys.exit(main())
