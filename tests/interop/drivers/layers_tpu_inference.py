"""Single layers of vLLM's JAX engine with packed weights, against NumPy in float64, on a mesh of four devices.

    python layers_tpu_inference.py OUT.json

Writes for each case the largest difference relative to the largest result, or the error. Words are made here, from the
formats' definitions, and by nothing of awq_jax.
"""

import json
import os
import sys
import traceback
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from tpu_inference.layers.jax.linear import (
    JaxEinsum,
    JaxLinear,
    JaxMergedColumnParallelLinear,
    JaxQKVParallelLinear,
)

from awq_jax.vllm.linear import PackedConfig
from awq_jax.vllm.settings import Settings

K, ORDER = 256, (0, 2, 4, 6, 1, 3, 5, 7)
RNG = np.random.default_rng(0)


def words(codes, bits, order=None):
    """int32 ``[A, B*bits/32]`` of codes ``[A, B]``, along B, lowest first."""
    per = 32 // bits
    pieces = codes.astype(np.uint32).reshape(codes.shape[0], -1, per)
    out = np.zeros(pieces.shape[:2], np.uint32)
    for i in range(per):
        out |= pieces[:, :, order[i] if order else i] << np.uint32(bits * i)
    return out.view(np.int32)


def linear(form, n, group, bits=4):
    """Tensors of the format by name, and the weight ``[K, N]`` in float64."""
    groups, symmetric = K // group, form.endswith("symmetric")
    codes = RNG.integers(0, 2**bits, (K, n))
    zeros = np.full((groups, n), 2 ** (bits - 1)) if symmetric else RNG.integers(0, 2**bits, (groups, n))
    scales = RNG.uniform(0.01, 0.02, (groups, n)).astype(np.float16)
    weight = (codes - zeros.repeat(group, 0)) * scales.astype(np.float64).repeat(group, 0)
    if form.startswith("gemm"):
        tensors = {"qweight": words(codes, 4, ORDER), "qzeros": words(zeros, 4, ORDER), "scales": scales}
    else:
        tensors = {
            "weight_packed": words(codes.T, bits),
            "weight_scale": np.ascontiguousarray(scales.T),
            "weight_shape": np.array([n, K], np.int64),
        }
        if not symmetric:
            tensors["weight_zero_point"] = np.ascontiguousarray(words(zeros, bits).T)
    return {name: torch.from_numpy(np.ascontiguousarray(t)) for name, t in tensors.items()}, weight


def config(form, group, bits=4, skipped=()):
    symmetric = form.endswith("symmetric")
    if form.startswith("gemm"):
        quant = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group, "zero_point": not symmetric}
        return PackedConfig(Settings.of(quant | {"modules_to_not_convert": list(skipped)}))
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    if group == K:
        weights |= {"strategy": "channel", "group_size": None}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    quant = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return PackedConfig(Settings.of(quant | {"ignore": list(skipped)}))


def made(kind, quant, bias):
    """A layer of a kind, the sizes of the checkpoint's linears that it is joined of, and its result's shape."""
    shared = {"rngs": nnx.Rngs(0), "quant_config": quant}
    out = lambda *axes: nnx.with_partitioning(nnx.initializers.uniform(), axes)  # noqa: E731
    if kind == "heads":
        shape = (8, 64) if bias else None
        made = JaxEinsum("TD,DNH->TNH", (K, 8, 64), bias_shape=shape, kernel_init=out(None, "model", None),
                         prefix="l.q_proj", **shared)  # fmt: skip
        return made, (512,), (8, 64)
    if kind == "out of heads":
        init = out("model", None, None)
        made = JaxEinsum("TNH,NHD->TD", (4, 64, 384), kernel_init=init, prefix="l.o_proj", **shared)
        return made, (384,), (384,)
    if kind == "down":
        made = JaxLinear(K, 384, use_bias=bias, kernel_init=out("model", None), prefix="l.down_proj", **shared)
        return made, (384,), (384,)
    if kind == "joined":
        made = JaxMergedColumnParallelLinear(K, [256, 512], use_bias=bias, kernel_init=out(None, "model"),
                                             prefix="l.gate_up_proj", **shared)  # fmt: skip
        return made, (256, 512), (768,)
    made = JaxQKVParallelLinear(hidden_size=K, num_heads=8, num_kv_heads=4, head_dim=64, use_bias=bias,
                                dtype=jnp.float32, prefix="l.qkv_proj", **shared)  # fmt: skip
    return made, (512, 256, 256), None


def difference(kind, form, group, bits=4, bias=False):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 4), ("data", "model"))
    with jax.set_mesh(mesh):
        layer, sizes, shape = made(kind, config(form, group, bits), bias)
        parts = [linear(form, n, group, bits) for n in sizes]
        biases = [RNG.normal(size=n).astype(np.float32) for n in sizes]
        for i, (tensors, _) in enumerate(parts):
            for name, tensor in tensors.items():
                param = getattr(layer, name)
                param.weight_loader(param, tensor, i if len(parts) > 1 else -1)
            if bias and len(parts) > 1:
                layer.bias.weight_loader(layer.bias, torch.from_numpy(biases[i]), i)
        if bias and len(parts) == 1:
            layer.bias[...] = jnp.asarray(biases[0].reshape(layer.bias[...].shape))
        assert layer.quant_method.process_weights_after_loading(layer)
        x = RNG.normal(size=(5, K)).astype(np.float32)
        given = jnp.asarray(x.reshape(5, 4, 64) if kind == "out of heads" else x)
        graph, state = nnx.split(layer)
        y = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, given)
        held = state["packed_qweight"][...]
    y = y if shape is not None else jnp.concatenate([part.reshape(5, -1) for part in y], -1)
    assert shape is None or y.shape == (5, *shape), y.shape
    assert held.dtype == jnp.uint32, held.dtype
    assert held.sharding.shard_shape(held.shape)[0] * held.sharding.shard_shape(held.shape)[1] == held.size // 4
    right = [x.astype(np.float64) @ w + (b if bias else 0) for (_, w), b in zip(parts, biases, strict=True)]
    right = np.concatenate(right, 1)
    return float(np.abs(np.asarray(y).reshape(5, -1) - right).max() / np.abs(right).max())


CASES = {
    f"{kind}, {form}, {group}, {bits} bits{', bias' if bias else ''}": (kind, form, group, bits, bias)
    for kind, form, group, bits, bias in (
        ("heads", "gemm", 128, 4, True),
        ("heads", "compressed symmetric", 32, 4, False),
        ("out of heads", "gemm", 64, 4, False),
        ("out of heads", "compressed", 32, 4, False),
        ("down", "gemm symmetric", 32, 4, True),
        ("down", "compressed", 64, 8, False),
        ("joined", "gemm", 32, 4, True),
        ("joined", "compressed", 128, 4, True),
        ("joined", "compressed symmetric", K, 4, False),
        ("queries, keys, values", "gemm", 64, 4, True),
        ("queries, keys, values", "compressed", K, 4, False),
    )
}


def refusals():
    """What is refused: the case and its message."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 4), ("data", "model"))
    found = {}
    with jax.set_mesh(mesh):
        layer, _, _ = made("joined", config("gemm", 32, skipped=("gate_proj", "up_proj")), False)
        found["skipped"] = type(layer.quant_method).__name__
        for name, act in {
            "half of a joined linear": lambda: made("joined", config("compressed", 32, skipped=("l.up_proj",)), False),
            "groups that do not divide": lambda: difference("down", "gemm", 128),
            "shapes that do not fit": misfit,
        }.items():
            try:
                act()
                found[name] = "nothing"
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
    return found


def misfit():
    layer, _, _ = made("down", config("gemm", 32), False)
    for name, tensor in linear("gemm", 256, 32)[0].items():
        getattr(layer, name).weight_loader(getattr(layer, name), tensor)
    layer.quant_method.process_weights_after_loading(layer)


if __name__ == "__main__":
    found = {}
    for name, case in CASES.items():
        try:
            found[name] = difference(*case)
        except Exception as error:
            traceback.print_exc()
            found[name] = f"{type(error).__name__}: {error}"
    Path(sys.argv[1]).write_text(json.dumps({"differences": found, "refusals": refusals()}, indent=1))
