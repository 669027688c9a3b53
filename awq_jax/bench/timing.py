"""Seconds per call of work on a device, the ceilings of the device, and which device it is."""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

Measurement = dict[str, Any]  # as JSON
CACHE_BYTES = 200 << 20  # more than three times the second-level cache of any chip in the tables


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device reaches on plain work, measured.

    Attributes:
      bandwidth: bytes per second, read and written together, of a large copy.
      flops: multiply-adds, counted as two, per second of a large bfloat16 product.
    """

    bandwidth: float
    flops: float


def per_call(fn: Callable[..., object], sets: Sequence[tuple[object, ...]], seconds: float = 0.2) -> float:
    """Median seconds of one call of ``fn``, many calls being one program.

    Args:
      fn: pure function of arrays.
      sets: arguments of one call each; enough of them that no cache holds them all. Each set has its
        own activation, so that XLA cannot join products that share one.
      seconds: to measure for, about.

    Returns:
      Seconds per call.
    """
    program = jax.jit(lambda sets: [fn(*arguments) for arguments in sets])

    def took(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):  # queued without waiting: the host is ahead of the device
            out = program(sets)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / repeats

    took(1)
    repeats = max(1, min(1000, int(seconds / 5 / took(1))))
    return statistics.median(took(repeats) for _ in range(5)) / len(sets)


def copies(nbytes: int, most: int = 64) -> int:
    """How many sets of ``nbytes`` no cache holds, and enough that starting a program costs little."""
    return max(16 if nbytes < CACHE_BYTES else 1, min(most, -(-CACHE_BYTES // max(nbytes, 1))))


def ceilings(scale: float = 1.0) -> Ceilings:
    """Measure this device; ``scale`` shrinks the arrays (2 GiB, and 8192 x 8192) for slow ones."""
    key = jax.random.key(0)
    words = int(scale * (1 << 28))
    big = jax.random.bits(key, (words,), jnp.uint32)
    copy = per_call(lambda a: a ^ 1, [(big,)])
    side = max(256, int(8192 * scale**0.5) // 128 * 128)
    a, b = (jax.random.normal(k, (side, side), jnp.bfloat16) for k in jax.random.split(key))
    product = per_call(lambda a, b: a @ b, [(a, b)])
    return Ceilings(8 * words / copy, 2 * side**3 / product)


def device() -> Measurement:
    """What is measured on: the device, and the versions of what runs on it."""
    installed = {d.name.lower(): d.version for d in metadata.distributions()}
    names = ("jax", "jaxlib", "jax-triton", "triton", "torch", "gemlite", "awq-jax")
    versions = {name: installed.get(name) for name in names}
    one = jax.devices()[0]
    return {"device": one.device_kind, "platform": one.platform, "python": sys.version.split()[0], "versions": versions}
