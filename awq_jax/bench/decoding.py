"""Decoding and prefill of whole models: the programs that `generate` runs, timed, and the memory they take."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from awq_jax import paths
from awq_jax.bench import random_models, timing
from awq_jax.errors import ConfigError
from awq_jax.models.config import ModelConfig
from awq_jax.qtensor import is_quantized
from awq_jax.serve.generate import bucket
from awq_jax.serve.sampling import Draws
from awq_jax.serve.served_weights import ServedWeights

# What a row says about decoding and not about prefill.
OF_STEPS = ("tokens_per_s", "ms_per_step", "floor_ms", "floor_share", "step_temp_bytes")


class DecodingTimer:
    """One model after a prompt of random tokens, ready to be timed.

    Args:
      weights: of the model; from here on in the form that `generate` serves.
      batch: rows decoded together.
      context: tokens of each row's prompt.
      steps: tokens that one call of `decode` decodes, greedily.

    Raises:
      ConfigError: a number is not positive, or the model's context is shorter.
    """

    def __init__(self, weights: ServedWeights, *, batch: int = 1, context: int = 512, steps: int = 64):
        c = weights.config
        if min(batch, context, steps) < 1:
            raise ConfigError("batch, context and steps must be at least 1")
        check_room(c, context, steps)
        generator, self.params = weights.serving()
        self.weights, self.batch, self.context, self.steps = weights, batch, context, steps
        self._tokens = np.random.default_rng(0).integers(0, c.vocab_size, (batch, context)).astype(np.int32)
        self._lengths = np.full(batch, context, np.int32)
        slots = bucket(context + steps, 64)
        arguments: tuple[Any, ...] = (self.params, self._tokens, self._lengths, Draws())  # greedy
        self._prefill = generator.compiled(generator.prefill, *arguments, slots=slots)
        drawn, _, self._cache = jax.block_until_ready(self._prefill(*arguments))
        self._token = drawn.ids
        arguments = (self.params, self._cache, Draws(), self._token, self._lengths)
        self._step = generator.compiled(generator.step, *arguments)

    def cache_bytes(self) -> int:
        """Of keys and values."""
        return paths.nbytes(self._cache)

    def temp_bytes(self) -> dict[str, int | None]:
        """What each compiled program needs besides its arguments and results, as its compiler counts it."""
        found = {"prefill": self._prefill.memory_analysis(), "step": self._step.memory_analysis()}
        return {name: None if m is None else int(m.temp_size_in_bytes) for name, m in found.items()}

    def prefill(self) -> float:
        """Seconds for the prompt."""
        start = time.perf_counter()
        jax.block_until_ready(self._prefill(self.params, self._tokens, self._lengths, Draws()))
        return time.perf_counter() - start

    def decode(self) -> tuple[float, float]:
        """Seconds, and processor seconds, of one step; the same positions each time."""
        start, cpu = time.perf_counter(), time.process_time()
        token, cache = self._token, self._cache
        for i in range(self.steps):
            drawn, _, cache = self._step(self.params, cache, Draws(), token, self._lengths + np.int32(i))
            token = drawn.ids
        jax.block_until_ready(token)
        took = time.perf_counter() - start, time.process_time() - cpu
        self._token, self._cache = token, cache
        return took[0] / self.steps, took[1] / self.steps


def check_room(c: ModelConfig, context: int, steps: int) -> None:
    """Refuse more tokens than the model has positions (`ConfigError`)."""
    if context + steps > c.max_length:
        raise ConfigError(f"{context} + {steps} tokens do not fit the model's context of {c.max_length}")


def read_per_step(c: ModelConfig, params: object) -> int:
    """Bytes of parameters that a decode step reads: all but an embedding of which it looks up rows only."""
    leaves = paths.flatten(params)
    if not c.tied:
        leaves.pop("embed_tokens/embedding", None)
    return paths.nbytes(leaves)


def largest_tile(params: object, itemsize: int = 2) -> int:
    """Bytes of the largest packed weight, dequantized: one matrix, of which experts are several."""
    packed = [q for q in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(q)]
    return max((q.k * q.n * itemsize for q in packed), default=0)


def peak_bytes() -> int | None:
    """The device allocator's peak since the process began, or None where it does not say."""
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
) -> timing.Measurement:
    """Time a model with random weights.

    Dense weights are merged as packed ones are, so that only the weights differ.

    Returns:
      A dict: ``model``, ``layers``, ``bits`` (None: dense), ``group_size``, ``batch``, ``context``,
      ``prefill_tokens_per_s``, ``tokens_per_s`` (of all sequences together), ``ms_per_step``, ``floor_ms`` (weights and
      cache read once at the copy bandwidth), ``floor_share``, ``served`` (the form of the weights), ``weight_bytes``,
      ``cache_bytes``; and memory: ``prefill_temp_bytes`` and ``step_temp_bytes`` (see `DecodingTimer.temp_bytes`),
      ``tile_bytes`` (the largest weight, dequantized), ``peak_bytes`` (of the process so far, by the allocator; None
      where it does not say), the same as ``peak_before_timing_bytes``, and ``peak_allowed_bytes``: weights, cache and
      one tile.

    Raises:
      ConfigError: unknown shape, or a group size that does not divide it.
    """
    c = random_models.config(name, layers)
    graphdef, params = random_models.random_model(c, dtype, bits, group)
    served = ServedWeights(graphdef, c, params, merge_linears=True)
    del params  # the form in which they are served may replace them
    timer = DecodingTimer(served, batch=batch, context=context, steps=steps)
    before = peak_bytes()
    timer.decode()
    took = statistics.median(timer.decode()[0] for _ in range(3))
    prompt = statistics.median(timer.prefill() for _ in range(3))
    weights, cache, tile = paths.nbytes(timer.params), timer.cache_bytes(), largest_tile(timer.params)
    least, temp = (read_per_step(c, timer.params) + cache) / top.bandwidth, timer.temp_bytes()
    return {
        "model": name, "layers": len(c.layers), "bits": bits, "group_size": group if bits else None,
        "batch": batch, "context": context, "prefill_tokens_per_s": batch * context / prompt,
        "tokens_per_s": batch / took, "ms_per_step": took * 1e3, "floor_ms": least * 1e3, "floor_share": least / took,
        "served": served.explain(), "weight_bytes": weights, "cache_bytes": cache, "tile_bytes": tile,
        "prefill_temp_bytes": temp["prefill"], "step_temp_bytes": temp["step"], "peak_bytes": peak_bytes(),
        "peak_allowed_bytes": weights + cache + tile, "peak_before_timing_bytes": before,
    }  # fmt: skip


def paired(timers: Mapping[str, DecodingTimer], against: str, rounds: int) -> dict[str, dict[str, float]]:
    """Decode with each timer in turn, in an order that rotates, so that a busy machine is busy for all.

    Args:
      timers: by name.
      against: the one that the others are compared with.
      rounds: how often each is timed.

    Returns:
      By name: ``ms_per_step``, ``cpu_ms_per_step`` (medians), ``best_ms_per_step``; how much faster than
      ``against`` it was in the same round, as a median (``speed``) with quartiles (``speed_low``,
      ``speed_high``), and in processor time (``cpu_speed``); and the best turns compared (``best_speed``), which
      other programs disturbed least.
    """
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in timers}
    for timer in timers.values():
        timer.decode()
    names = list(timers)
    for i in range(rounds):
        for name in np.roll(names, -i):
            turns[name].append(timers[name].decode())
    took = {name: np.array(mine) for name, mine in turns.items()}  # [rounds, 2]: seconds, processor seconds
    best = {name: float(mine[:, 0].min()) for name, mine in took.items()}
    out: dict[str, dict[str, float]] = {}
    for name, mine in took.items():
        speed, cpu_speed = (took[against] / np.maximum(mine, 1e-9)).T
        low, middle, high = np.quantile(speed, (0.25, 0.5, 0.75)).tolist()
        ms, cpu_ms = (np.median(mine, axis=0) * 1e3).tolist()
        out[name] = {
            "ms_per_step": ms, "cpu_ms_per_step": cpu_ms, "speed": middle, "speed_low": low, "speed_high": high,
            "cpu_speed": float(np.median(cpu_speed)),
            "best_ms_per_step": best[name] * 1e3, "best_speed": best[against] / best[name],
        }  # fmt: skip
    return out


def line(row: timing.Measurement) -> str:
    """One row for people."""
    weights = "dense" if row["bits"] is None else f"{row['bits']} bits"
    text = f"{row['model']} ({row['layers']} layers) {weights:7s} prefill {row['prefill_tokens_per_s']:9.1f} tokens/s"
    if "tokens_per_s" in row:
        text += f"  decode {row['tokens_per_s']:7.1f} tokens/s, {row['floor_share']:.0%} of the floor"
    text += f"  weights {row['weight_bytes'] / 2**30:.2f} GiB"
    if row["peak_bytes"] is not None:
        text += f"  peak {row['peak_bytes'] / 2**30:.2f} of {row['peak_allowed_bytes'] / 2**30:.2f} GiB"
    return text
