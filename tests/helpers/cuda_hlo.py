"""Compiles for H200s that are not here; a process of its own: ``cuda_hlo.py forms|memory|mesh [triton]``.

Needs the CUDA plugin's wheels, not a GPU, and a private way into them: it prints JSON, ``{"skip": reason}`` where
that way is closed, else what the part of that name found.
"""

import contextlib
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


def mesh(size: int = 1):
    """Of H200s that can only be compiled for."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh
    from jaxlib import xla_client

    jax.devices()  # finds and loads the plugin
    xla = xla_client._xla
    if not xla.pjrt_plugin_initialized("cuda"):
        xla.initialize_pjrt_plugin("cuda")
    topology = xla.get_default_c_api_topology("cuda", "H200", {"target_config": TARGET, "topology": f"1x1x{size}"})
    devices = topologies.TopologyDescription(topology._make_compile_only_devices()).devices
    return Mesh(np.array(devices[:size]), ("d",))


@contextlib.contextmanager
def on_h200():
    """The kernels are chosen as if one were here."""
    from unittest import mock

    from awq_jax.kernels import dispatch, tuned

    h200 = tuned.Chip("NVIDIA H200", 90, 132)
    here = mock.patch.object(tuned, "local_chip", return_value=h200)
    with here, mock.patch.object(dispatch, "platform_of", return_value="cuda"):
        yield


def weight(kind: str, place=None):
    """An abstract packed weight; ``triton`` reads the CUDA layout."""
    import jax
    import jax.numpy as jnp

    from awq_jax import pack
    from awq_jax.qtensor import QuantizedTensor

    cuda, groups = kind == "triton", (K // 128, N)
    return QuantizedTensor(
        jax.ShapeDtypeStruct(*(((N, pack.halfwords(K, 4)), jnp.uint16) if cuda else ((K // 8, N), jnp.uint32))),
        jax.ShapeDtypeStruct(groups, jnp.bfloat16), jax.ShapeDtypeStruct(groups, jnp.uint8), None, 4, 128, "kn",
        (K,), (N,), "bfloat16", layout="cuda" if cuda else "canonical", placement=place,
    )  # fmt: skip


def at(tree, where):
    """Abstract arrays with shardings: one for all, or a tree of them."""
    import jax
    from jax.sharding import Sharding

    if isinstance(where, Sharding):
        where = jax.tree.map(lambda _: where, tree)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, where)


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


def temporary(kind: str, layers: int, tokens: int) -> dict[str, int]:
    """Bytes that a program of a model of Llama 2's shape needs besides arguments and results; and of one weight.

    Args:
      kind: ``triton``, ``xla``, or ``dense``: bfloat16 weights.
      layers: of the model.
      tokens: of the prompt; 0: a decode step.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from awq_jax import kernels
    from awq_jax.bench import decoding, random_models
    from awq_jax.models import init_cache
    from awq_jax.models.weights import params as model_params
    from awq_jax.serve.generate import Generator
    from awq_jax.serve.sampling import Draws

    where = NamedSharding(mesh(), PartitionSpec())
    c = dataclasses.replace(random_models.config("llama-2-7b", layers), vocab_size=1024)

    def make():
        params = random_models.random_model(c, "bfloat16", None if kind == "dense" else 4)[1]
        return kernels.prepare(params, "cuda") if kind == "triton" else params

    params, one = at(jax.eval_shape(make), where), jnp.zeros(1, jnp.int32)
    one = at(jax.eval_shape(lambda: one), where)
    generator = Generator(model_params.abstract(c)[0], c)
    with on_h200():
        if tokens:
            prompt = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=where)
            program = generator.prefill.lower(params, prompt, one, Draws(), slots=tokens + 64)
        else:
            cache = at(jax.eval_shape(lambda: init_cache(c, 1, 64, jnp.bfloat16)), where)
            program = generator.step.lower(params, cache, Draws(), one, one)
    assert ("triton_kernel_call" in program.as_text()) == (kind == "triton")
    temp = program.compile().memory_analysis().temp_size_in_bytes
    return {"temp": temp, "tile": decoding.largest_tile(params)}


def memory(kinds: list[str]) -> dict[str, dict[str, int]]:
    """`temporary` by ``kind layers tokens``; ``untiled``: the XLA form without its loop over tiles of columns."""
    from unittest import mock

    import jax

    from awq_jax.kernels import xla

    cases = [(kind, layers, 0) for kind in kinds for layers in (3, 5)]
    for kind in kinds:
        tokens = 2048 if kind == "triton" else 128
        cases += [(k, layers, tokens) for k in (kind, "dense") for layers in (1, 3)]
    found = {" ".join(map(str, case)): temporary(*case) for case in cases}
    jax.clear_caches()  # or the loop that was traced above is taken again
    with mock.patch.object(xla, "TILE", K * N * 1000):
        found["untiled 3 128"] = temporary("xla", 3, 128)
    return found


def forms(kinds: list[str]) -> dict[str, list[tuple[str, int]]]:
    """The arrays that each form of the product in XLA writes outside of fusions."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from awq_jax.kernels import xla

    where, out = NamedSharding(mesh(), PartitionSpec()), {}
    for kind in ("xla", "triton"):
        for form, m in (("grouped", 1), ("grouped", 2), ("grouped", 16), ("grouped", 64), ("dequantize", 64)):
            run = jax.jit(functools.partial(getattr(xla, form), out_dtype=jnp.bfloat16), out_shardings=where)
            x, q = at((jax.ShapeDtypeStruct((m, K), jnp.bfloat16), weight(kind)), where)
            out[f"{form} {m} {kind}"] = written(run.lower(x, q).compile().as_text())
    return out


def spread(kinds: list[str]) -> dict[str, dict[str, list[str]]]:
    """What a product with a weight cut over several devices sends, and the shapes of the words its kernel reads."""
    from unittest import mock

    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from awq_jax.kernels import dispatch, parallel, xla
    from awq_jax.placement import Placement

    out = {}
    for kind, size, dim in [(kind, size, dim) for kind in kinds for size in (2, 4) for dim in "kn"]:
        place = Placement(mesh(size), "d", dim)
        x = jax.ShapeDtypeStruct((1, K), jnp.bfloat16, sharding=NamedSharding(place.mesh, PartitionSpec()))
        many = x.update(shape=(2048, K))
        q = weight(kind, place)
        q = at(q, parallel.shardings(q, place))
        cases = [("", x, q), (" many", many, q)]
        if dim == "n":  # what the compiler makes of it by itself
            cases.append((" unplaced", x, dataclasses.replace(q, placement=None)))
        for name, x, q in cases:
            with on_h200(), mock.patch.object(xla, "TILE", K * N // 16):
                text = jax.jit(functools.partial(dispatch.matmul, impl=kind)).lower(x, q).compile().as_text()
            sent = re.findall(r"= (.*?) ((?:all|reduce|collective)-[\w-]+?)(?:-start)?\(", text)
            read = re.findall(r"u16\[[\d,]+\]", " ".join(li for li in text.splitlines() if '"triton_kernel' in li))
            said = {"sent": [f"{op} {what}" for what, op in sent if not op.endswith("done")], "read": sorted(set(read))}
            out[f"{kind} {size} {dim}{name}"] = said
    return out


def main() -> None:
    try:
        mesh()
    except Exception as e:  # a private interface: absent or changed in another version
        print(json.dumps({"skip": f"{type(e).__name__}: {e}"[:300]}))
        return
    part = {"forms": forms, "memory": memory, "mesh": spread}[sys.argv[1]]
    print(json.dumps({"K": K, "N": N, "found": part(["xla", *sys.argv[2:]])}))


if __name__ == "__main__":
    sys.exit(main())
