"""How fast a model of a given shape decodes: random weights, the same programs that `generate` runs."""

from __future__ import annotations

import functools
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from awq_jax import paths
from awq_jax.errors import ConfigError
from awq_jax.generate import bucket
from awq_jax.models import config_from_hf
from awq_jax.models import params as model_params
from awq_jax.models.config import ModelConfig
from awq_jax.qtensor import QuantizedTensor
from awq_jax.sampling import Sampling
from awq_jax.served import Weights


def _llama(vocab: int, size: int, inner: int, layers: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": vocab, "hidden_size": size, "intermediate_size": inner, "num_hidden_layers": layers}
    others = {"num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": 4096}
    return {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 1e4} | sizes | others | more


# Published configs; the last two are for CPUs and tests.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(32000, 4096, 11008, 32, 32, 32),
    "llama-3-8b": _llama(128256, 4096, 14336, 32, 32, 8, rope_theta=5e5, max_position_embeddings=8192),
    "llama-100m": _llama(8192, 768, 2048, 12, 12, 12),
    "tiny": _llama(256, 128, 256, 2, 4, 2),
}


def random_params(
    config: ModelConfig, dtype: str, bits: int = 4, group_size: int = 128, packed: bool = True, seed: int = 0
) -> tuple[nnx.GraphDef, nnx.State]:
    """A decoder with random weights, made on the default device one leaf at a time.

    Args:
      config: the architecture.
      dtype: of activations, float weights and scales.
      bits, group_size: of packed weights: the layers' linears, as AWQ leaves embedding and head float.
      packed: False makes all of them float.
      seed: of the weights.

    Raises:
      ConfigError: the group size does not divide a layer, or does not fill words.
    """
    graphdef, state = model_params.abstract(config)

    def leaf(path: str, like: Any) -> Any:
        nonlocal seed
        seed += 1
        key, shape = jax.random.key(seed), tuple(like.shape)
        if path.endswith(("norm/scale", "layernorm/scale")):
            return jnp.ones(shape, dtype)
        if not packed or not path.startswith("layers/") or not path.endswith("/kernel") or "/gate/" in path:
            std = shape[-2] ** -0.5 if len(shape) > 1 else 0.02
            return _normal(key, shape, dtype, std)
        *lead, k, n = shape
        if k % group_size or group_size * bits % 32:
            raise ConfigError(f"groups of {group_size} do not divide the {k} rows of {path} into words; choose another")
        groups = k // group_size
        steps = k**-0.5 / 2 ** (bits - 2)  # codes are spread over about four standard deviations
        return QuantizedTensor(
            qweight=_bits(key, (*lead, k * bits // 32, n)),
            scales=jnp.full((*lead, groups, n), steps, dtype),
            zeros=jnp.full((*lead, groups, n), 2 ** (bits - 1), jnp.uint8),
            inv_scale=None,
            bits=bits,
            group_size=group_size,
            axes="b" * len(lead) + "kn",
            k_dims=(k,),
            n_dims=(n,),
            dtype=dtype,
        )

    return graphdef, paths.map_with_path(leaf, state)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))  # one program per shape, and no float32 copy
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str, std: float) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def _bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bits(key, shape, jnp.uint32)


def decode(
    shape: str | ModelConfig,
    *,
    packed: bool = True,
    bits: int = 4,
    group_size: int = 128,
    dtype: str = "bfloat16",
    batch: int = 1,
    context: int = 128,
    steps: int = 64,
    repeats: int = 3,
    merge: bool | None = None,
    resident: bool | None = None,
    bandwidth: float | None = None,
) -> dict[str, Any]:
    """Time the decode step of a model with random weights, after a prompt.

    Args:
      shape: a name in `SHAPES`, or an architecture.
      packed, bits, group_size, dtype: see `random_params`.
      batch: rows decoded together.
      context: tokens of each row's prompt.
      steps: tokens decoded after it, one step each.
      repeats: how often they are timed; the median counts.
      merge, resident: see `awq_jax.load`.
      bandwidth: of the memory, in bytes per second; None measures it in this run (see `copy_bandwidth`).

    Returns:
      ``tokens_per_second`` (of all rows together), ``ms_per_step``, ``weight_bytes`` (as served),
      ``bytes_per_step`` (weights and cache read; of the embedding only the rows looked up), ``bandwidth`` in
      bytes per second, ``floor_ms`` and ``floor_share`` (the time those bytes take, over the step's),
      ``peak_bytes`` of device memory (None where the platform does not say), and the settings.

    Raises:
      ConfigError: unknown shape, or a bad setting.
    """
    if isinstance(shape, str) and shape not in SHAPES:
        raise ConfigError(f"no shape {shape!r}; choose one of {', '.join(SHAPES)}")
    if min(batch, context, steps, repeats) < 1:
        raise ConfigError("batch, context, steps and repeats must be at least 1")
    config = config_from_hf(SHAPES[shape]) if isinstance(shape, str) else shape
    if context + steps > config.max_length:
        raise ConfigError(f"{context} + {steps} tokens do not fit the model's context of {config.max_length}")
    bandwidth = bandwidth or copy_bandwidth()
    graphdef, made = random_params(config, dtype, bits, group_size, packed)
    weights = Weights(graphdef, config, made, merge, resident)
    del made  # so that the form in which they are served may replace them
    generator, params = weights.serving()
    slots = bucket(context + steps, 64)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (batch, context)).astype(np.int32)
    lengths = np.full(batch, context, np.int32)
    options = (jax.random.key(0), np.float32(0), np.int32(0), np.float32(1))
    seconds = []
    for repeat in range(repeats + 1):
        token, cache = generator.prefill(params, tokens, lengths, *options, slots=slots, mode=Sampling().mode)
        jax.block_until_ready(token)
        start = time.perf_counter()
        for step in range(steps if repeat else 1):  # the first run compiles
            token, cache = generator.step(
                params, cache, token, lengths + np.int32(step), *options, mode=Sampling().mode
            )
        jax.block_until_ready(token)
        seconds.append((time.perf_counter() - start) / steps)
    step_seconds = statistics.median(seconds[1:])
    read = _bytes_read(config, params) + paths.nbytes(cache)
    device = jax.tree.leaves(params)[0].devices().pop()
    memory = device.memory_stats() or {}
    return {
        "shape": shape if isinstance(shape, str) else config.family,
        "weights": f"w{bits} g{group_size}" if packed else dtype,
        "served": weights.explain(),
        "device": device.device_kind,
        "batch": batch,
        "context": context,
        "steps": steps,
        "tokens_per_second": batch / step_seconds,
        "ms_per_step": step_seconds * 1e3,
        "weight_bytes": paths.nbytes(params),
        "bytes_per_step": read,
        "bandwidth": bandwidth,
        "floor_ms": read / bandwidth * 1e3,
        "floor_share": read / bandwidth / step_seconds,
        "peak_bytes": memory.get("peak_bytes_in_use"),
    }


def copy_bandwidth(size: int | None = None) -> float:
    """Bytes per second that the default device reads and writes together, adding 1 to an array.

    Args:
      size: of the array in bytes; default: 1 GiB, on CPU 256 MiB.
    """
    size = size or 2 ** (28 if jax.default_backend() == "cpu" else 30)
    x = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    jax.block_until_ready(add(x))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(add(x))
        best = min(best, time.perf_counter() - start)
    return 2 * x.nbytes / best


def _bytes_read(config: ModelConfig, params: Any) -> int:
    """Bytes of the weights that one step reads."""
    leaves = paths.flatten(params)
    if not config.tied:
        leaves.pop("embed_tokens/embedding")
    return paths.nbytes(leaves)
