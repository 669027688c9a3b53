"""Compiles the TPU kernel for chips that are not there and prints one JSON line per case (needs ``libtpu``).

A process of its own: libtpu reads its settings when it is first loaded.
"""

from __future__ import annotations

import json
import os
import resource
import sys

PROCESSOR_SECONDS = 600  # of which it takes some 70; on busy cores the time that passes says nothing
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # the process that runs the tests may hold its lock
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
# m, K, N, bits, group size, offset kind, dtype of the scales, dtype of the activations
CASES = (
    (1, 4096, 14336, 4, 128, "zeros", "float16", "bfloat16"),
    (16, 14336, 4096, 4, 128, "symmetric", "bfloat16", "bfloat16"),
    (64, 4096, 4096, 4, -1, "zeros", "bfloat16", "bfloat16"),
    (5, 4096, 4096, 4, 32, "offsets", "float32", "bfloat16"),
    (512, 4096, 4096, 4, 32, "zeros", "float16", "bfloat16"),
    (300, 4096, 4096, 8, 64, "zeros", "float16", "float32"),
    (2048, 11008, 4096, 4, 128, "zeros", "bfloat16", "bfloat16"),
    (16, 4096, 4096, 8, 128, "symmetric", "bfloat16", "float32"),
    (3, 576, 200, 4, 64, "symmetric", "float32", "bfloat16"),
    (1, 128, 128, 4, 16, "zeros", "bfloat16", "float16"),
    (7, 4096, 1000, 8, 256, "zeros", "float16", "bfloat16"),
    (1, 192, 384, 8, 32, "zeros", "float16", "bfloat16"),
)


def main() -> None:
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from awq_jax.kernels import Request, pallas_tpu
    from awq_jax.qtensor import QuantizedTensor

    def abstract(k, n, bits, g, kind, scales, batch=()):
        g = k if g == -1 else g
        table = (*batch, -(-k // g), n)
        make = jax.ShapeDtypeStruct
        return QuantizedTensor(
            qweight=make((*batch, table[-2] * g * bits // 32, n), jnp.uint32),
            scales=make(table, scales),
            zeros=make(table, jnp.uint8) if kind == "zeros" else None,
            inv_scale=None,
            bits=bits,
            group_size=g,
            axes="b" * len(batch) + "kn",
            k_dims=(k,),
            n_dims=(n,),
            dtype="bfloat16",
            offsets=make(table, scales) if kind == "offsets" else None,
        )

    topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
    place = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())

    def compiled(name, f, *args):
        try:
            program = jax.jit(f, in_shardings=place, out_shardings=place).lower(*args).compile()
        except Exception as e:
            return print(json.dumps({"case": name, "error": str(e)[:2000]}), flush=True)
        memory = program.memory_analysis()
        print(json.dumps({"case": name, "temp": memory.temp_size_in_bytes, "arguments": memory.argument_size_in_bytes,
                          "kernel": "tpu_custom_call" in program.as_text()}), flush=True)  # fmt: skip

    for case in CASES:
        m, k, n, bits, g, kind, scales, dtype = case
        q = abstract(k, n, bits, g, kind, scales)
        assert pallas_tpu.obstacle(Request(m, q, dtype, "tpu")) is None, case
        x = jax.ShapeDtypeStruct((m, k), dtype)
        compiled(list(case), lambda x, q: pallas_tpu.matmul(x, q, x.dtype), x, q)
    q = abstract(4096, 4096, 4, 128, "zeros", "float16", (8,))
    tiles, which = jax.ShapeDtypeStruct((6, 16, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((6,), jnp.int32)
    compiled("experts", lambda x, q, e: pallas_tpu.experts(x, q, e, x.dtype), tiles, q, which)

    big, x = abstract(8192, 8192, 4, 128, "zeros", "float16"), jax.ShapeDtypeStruct((16, 8192), jnp.bfloat16)
    good = pallas_tpu.tile
    # Not larger than need be: a tile is unrolled, so that compiling takes the time of its weights (8192 x 8192: 98
    # processor seconds for v6e, this 36), and whether it fits is only then known. v6e has room for 4096 x 4096.
    for name, change in {"too large": {"k": 4096, "n": 8192, "sums": False}, "not of registers": {"n": 100}}.items():
        pallas_tpu.tile = lambda *a, change=change: dataclasses.replace(good(*a), **change)
        compiled(name, lambda x, q: pallas_tpu.matmul(x, q, x.dtype), x, big)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS))
    os.environ.update(SETTINGS)
    main()
