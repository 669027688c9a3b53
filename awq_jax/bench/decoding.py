"""Decoding and prefill of whole models: random weights in the shapes of known ones, nothing downloaded."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from awq_jax import kernels, models, paths
from awq_jax.bench import timing
from awq_jax.generate import Generator
from awq_jax.models import merge
from awq_jax.models import params as model_params
from awq_jax.models.config import ModelConfig
from awq_jax.qtensor import QuantizedTensor, is_quantized

_LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
    "llama-2-7b": _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    },
    "small": _LLAMA | {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 512, "rope_theta": 10000.0,
    },
}  # fmt: skip


# What says nothing about prefill.
OF_STEPS = ("tokens_per_s", "ms_per_step", "floor_ms", "floor_share")


def config(name: str, layers: int | None = None, fused: bool = True) -> ModelConfig:
    """A shape's architecture, with fused projections, and fewer layers if asked."""
    c = models.config_from_hf(SHAPES[name] | ({"num_hidden_layers": layers} if layers else {}))
    if fused:
        decoder = list(c.layers)
        for group in merge.groups(c):
            decoder[group.layer] = group.fused(decoder[group.layer])
        c = dataclasses.replace(c, layers=tuple(decoder))
    return c


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * shape[-2 if len(shape) > 1 else 0] ** -0.5).astype(dtype)


def random_state(
    c: ModelConfig, bits: int | None, group: int, dtype: str = "bfloat16"
) -> tuple[nnx.GraphDef, nnx.State]:
    """A decoder with random weights; those inside its layers packed with ``bits`` unless None.

    The embedding and the head stay float, as in AWQ checkpoints.
    """
    graphdef, state = model_params.abstract(c)
    number = iter(range(1 << 30))

    def leaf(path: str, shape: Any) -> Any:
        key, size = jax.random.key(next(number)), tuple(shape.shape)
        if len(size) == 1:
            return jnp.ones(size, dtype)
        if bits is None or not path.endswith("kernel") or not path.startswith("layers/"):
            return _normal(key, size, dtype)
        k, n = size
        g = k if group == -1 else group
        a, b = jax.random.split(key)
        words = jax.random.bits(a, (k * bits // 32, n), jnp.uint32)
        scales = jnp.full((k // g, n), k**-0.5 / 2 ** (bits - 2), dtype)
        zeros = jax.random.bits(b, (k // g, n), jnp.uint8) >> (8 - bits)
        return kernels.prepare(QuantizedTensor(words, scales, zeros, None, bits, g, "kn", (k,), (n,), dtype))

    return graphdef, paths.map_with_path(leaf, state)


def nbytes(state: Any) -> int:
    """Bytes of all arrays."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))


def read_per_step(state: Any) -> int:
    """Bytes of parameters that one decode step reads: all but the embedding, of which it looks up rows."""
    flat = paths.flatten(state)
    return nbytes([leaf for path, leaf in flat.items() if "embed_tokens" not in path])


def peak_bytes() -> int | None:
    """The device allocator's peak so far, or None where it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def run(
    name: str,
    bits: int | None,
    top: timing.Ceilings,
    *,
    group: int = 128,
    batch: int = 1,
    context: int = 512,
    steps: int = 64,
    layers: int | None = None,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Prefill ``context`` tokens, then decode ``steps`` tokens greedily.

    Returns:
      A dict: ``model``, ``bits`` (None: dense), ``batch``, ``context``, ``prefill_tokens_per_s``,
      ``tokens_per_s`` (of one sequence), ``ms_per_step``, ``floor_ms`` (weights and cache read once),
      ``floor_share``, ``weight_bytes``, ``cache_bytes``, ``peak_bytes``.
    """
    c = config(name, layers)
    graphdef, state = random_state(c, bits, group, dtype)
    generator = Generator(graphdef, c)
    slots = context + steps + 8
    tokens = np.random.default_rng(0).integers(0, c.vocab_size, (batch, context)).astype(np.int32)
    lengths = np.full(batch, context, np.int32)
    options = (jax.random.key(0), np.float32(0), np.int32(0), np.float32(1))

    def prefill() -> Any:
        return generator.prefill(state, tokens, lengths, *options, slots=slots, mode="greedy")

    jax.block_until_ready(prefill())
    took = []
    for _ in range(3):
        start = time.perf_counter()
        token, cache = jax.block_until_ready(prefill())
        took.append(time.perf_counter() - start)
    cache_bytes = nbytes(cache)
    token, cache = generator.step(state, cache, token, lengths, *options, mode="greedy")
    jax.block_until_ready(token)
    start = time.perf_counter()
    for i in range(1, steps + 1):
        token, cache = generator.step(state, cache, token, lengths + np.int32(i), *options, mode="greedy")
    jax.block_until_ready(token)
    step = (time.perf_counter() - start) / steps
    least = (read_per_step(state) + cache_bytes) / top.bandwidth
    packed = [leaf for leaf in jax.tree.leaves(state, is_leaf=is_quantized) if is_quantized(leaf)]
    form = kernels.explain(jax.ShapeDtypeStruct((batch, packed[0].k), dtype), packed[0]) if packed else "dense"
    return {
        "model": name, "layers": len(c.layers), "bits": bits, "group_size": group if bits else None, "form": form,
        "batch": batch, "context": context, "prefill_tokens_per_s": batch * context / statistics.median(took),
        "tokens_per_s": 1 / step, "ms_per_step": step * 1e3, "floor_ms": least * 1e3, "floor_share": least / step,
        "weight_bytes": nbytes(state), "cache_bytes": cache_bytes, "peak_bytes": peak_bytes(),
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    weights = "dense" if row["bits"] is None else f"{row['bits']} bits"
    text = f"{row['model']} ({row['layers']} layers) {weights:7s} prefill {row['prefill_tokens_per_s']:9.1f} tokens/s"
    if "tokens_per_s" in row:
        text += f"  decode {row['tokens_per_s']:7.1f} tokens/s, {row['floor_share']:.0%} of the floor"
    peak = "" if row["peak_bytes"] is None else f"  peak {row['peak_bytes'] / 2**30:.2f} GiB"
    return f"{text}  weights {row['weight_bytes'] / 2**30:.2f} GiB{peak}"
