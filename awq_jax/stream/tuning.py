"""Scales and norms of a packed decoder tuned to the float model's predictions; the codes stay as they are.

The divergence of the packed model is lowered by gradient: a factor for each scale (group and column) and each number
of the norms and biases, by Adam. The model is gone through block by block, forth and back, so that only one block's
weights are floats at a time: what goes into each block is kept, and a block is computed anew for its gradient.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from awq_jax.errors import CalibrationError, ConfigError, WeightError
from awq_jax.models import ModelConfig
from awq_jax.progress import Progress, bar
from awq_jax.qtensor import QuantizedTensor, Weight
from awq_jax.stream import folds
from awq_jax.stream.decoder_blocks import EMBED, HEAD, REST, Chain, DecoderBlock, Leaves, Read

Factors = dict[str, dict[str, jax.Array]]  # by block, and by path within it: what is added to a factor of 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """How scales are tuned.

    Attributes:
      epochs: times that all sequences but those kept out are gone through.
      batch_size: sequences for one step.
      learning_rate: of the factors, at its highest: it rises for a tenth of the steps, and falls as a cosine.
      seed: of the order of sequences.
    """

    epochs: int = 4
    batch_size: int = 4
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 < self.learning_rate < 1:
            raise ConfigError(f"learning_rate must be above 0 and below 1; got {self.learning_rate}")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What tuning did.

    Attributes:
      leaves: by path: packed weights with other scales, norms and biases; as they were if nothing was gained.
      before, after: divergence from the float model, in nats per prediction, on the sequences kept out; ``after`` with
        what is stored.
      curve: ``after`` by epoch, before rounding to the stored dtypes.
      tokens: tuned on, without those kept out.
    """

    leaves: dict[str, Weight]
    before: float
    after: float
    curve: list[float]
    tokens: int


def tune(
    config: ModelConfig,
    packed: Mapping[str, Weight],
    read: Read,
    rows: np.ndarray,
    settings: Settings | None = None,
    progress: Progress = True,
) -> Tuned:
    """Tune the scales of a decoder.

    Memory: ``packed``; one block as floats; what goes into each block for a batch of sequences; what comes out of the
    last layer of the float model, for all of them.

    Args:
      config: architecture.
      packed: parameters by path, some of them packed.
      read: a block's float parameters by path within it; called once for each block.
      rows: int32 ``[R, T]``, R at least 2; one in eight, at least one, is kept out.
      settings: how.
      progress: show a progress bar on stderr; or call this function with what is done of how much.

    Raises:
      CalibrationError: fewer than two sequences.
      ConfigError: nothing is packed.
      WeightError: the divergence is not finite.
    """
    settings = settings or Settings()
    if len(rows) < 2:
        raise CalibrationError("tuning needs two sequences or more: one is kept out, to see whether it helps")
    if not any(isinstance(leaf, QuantizedTensor) for leaf in packed.values()):
        raise ConfigError("no weight is packed: there are no scales to tune")
    kept = folds.kept_out(len(rows))
    size = min(settings.batch_size, len(rows) - kept)
    steps = settings.epochs * ((len(rows) - kept) // size)
    with bar(progress, "tune", "step", steps) as shown:
        work = _Streams(config, packed, rows)
        work.see_floats(read, size)
        fitted, held = np.arange(len(rows) - kept), np.arange(len(rows) - kept, len(rows))
        factors = work.unchanged()
        rate, rise = settings.learning_rate, max(1, steps // 10)
        schedule = optax.warmup_cosine_decay_schedule(rate / (rise + 1), rate, rise, max(steps, rise + 1))
        optimizer = optax.adam(schedule, b2=0.99)
        state = optimizer.init(factors)

        @jax.jit
        def step(factors: Factors, state: Any, gradient: Factors) -> tuple[Factors, Any]:
            change, state = optimizer.update(gradient, state, factors)
            return optax.apply_updates(factors, change), state

        before = work.divergence(factors, held, size)
        best, curve = (before, factors), []
        order = np.random.default_rng(settings.seed)
        for _ in range(settings.epochs):
            shuffled = order.permutation(fitted)
            for start in range(0, len(shuffled) - size + 1, size):
                gradient = work.gradient(factors, np.sort(shuffled[start : start + size]))
                factors, state = step(factors, state, gradient)
                shown.update()
            curve.append(work.divergence(factors, held, size))
            if not np.isfinite(curve[-1]):
                raise WeightError("the divergence is not finite: lower learning_rate")
            best = min(best, (curve[-1], factors), key=lambda entry: entry[0])
        leaves = work.stored(best[1])
        after = work.holding(leaves).divergence(work.unchanged(), held, size)
    if not after < before:
        leaves, after = dict(packed), before
    return Tuned(leaves, before, after, curve, int(len(fitted) * rows.shape[1]))


class _Streams:
    """The sequences in the float model and in the packed one.

    Args:
      config, packed, rows: see `tune`.
    """

    def __init__(self, config: ModelConfig, packed: Mapping[str, Weight], rows: np.ndarray) -> None:
        self._chain = Chain(config)
        self._blocks = [b for b in self._chain.blocks if b.kind != REST]
        self._rows = rows
        self._programs: dict[Hashable, Callable[..., Any]] = {}
        self._last: np.ndarray | None = None
        self._float_head: Leaves = {}
        self._hold(packed)

    def _hold(self, packed: Mapping[str, Weight]) -> None:
        self._packed = dict(packed)
        self._leaves = {b.name: {p: packed[b.prefix + p] for p in b.leaves} for b in self._blocks}

    def holding(self, packed: Mapping[str, Weight]) -> _Streams:
        """The same with other packed weights."""
        other = copy.copy(self)
        other._hold(packed)
        return other

    def unchanged(self) -> Factors:
        """No change."""
        return {
            b.name: {
                p: jnp.zeros(leaf.scales.shape if isinstance(leaf, QuantizedTensor) else leaf.shape, jnp.float32)
                for p, leaf in self._leaves[b.name].items()
                if p in b.owned and _tunable(leaf)
            }
            for b in self._blocks
            if b.kind != EMBED
        }

    def see_floats(self, read: Read, size: int) -> None:
        """Send all sequences through the float model, up to its head."""
        hidden = [self._rows[i : i + size] for i in range(0, len(self._rows), size)]
        for block in self._blocks:
            leaves = read(block)
            if block.kind == HEAD:
                self._float_head = leaves
            else:
                hidden = [np.asarray(self._forward(block)(leaves, {}, x)) for x in hidden]
        self._last = np.concatenate(hidden)

    def gradient(self, factors: Factors, rows: np.ndarray) -> Factors:
        """Of the mean divergence of some sequences."""
        entered = self._through(factors, rows)
        head = self._blocks[-1]
        _, given, back = self._compare(head, gradient=True)(
            self._leaves[head.name], factors[head.name], self._float_head, entered.pop(), self._target(rows)
        )
        out = {head.name: given}
        for block in reversed(self._blocks[1:-1]):
            out[block.name], back = self._backward(block)(
                self._leaves[block.name], factors[block.name], entered.pop(), back
            )
        scale = 1.0 / self._rows[rows].size
        return jax.tree.map(lambda g: g * scale, {b: out[b] for b in factors})

    def divergence(self, factors: Factors, rows: np.ndarray, size: int) -> float:
        """KL(float || packed) in nats per prediction."""
        head, total = self._blocks[-1], 0.0
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            x = self._through(factors, some)[-1]
            given = self._leaves[head.name], factors[head.name], self._float_head, x, self._target(some)
            total += float(self._compare(head, gradient=False)(*given))
        return total / self._rows[rows].size

    def stored(self, factors: Factors) -> dict[str, Weight]:
        """All leaves with the factors in them, in the dtypes that they had."""
        out = dict(self._packed)
        for block in self._blocks:
            for path, t in factors.get(block.name, {}).items():
                leaf = self._leaves[block.name][path]
                out[block.prefix + path] = _as_before(_scaled(leaf, t), leaf)
        return out

    def _target(self, rows: np.ndarray) -> np.ndarray:
        assert self._last is not None
        return self._last[rows]

    def _through(self, factors: Factors, rows: np.ndarray) -> list[jax.Array]:
        """What goes into each block."""
        entered = [jnp.asarray(self._rows[rows])]
        for block in self._blocks[:-1]:
            entered.append(self._forward(block)(self._leaves[block.name], factors.get(block.name, {}), entered[-1]))
        return entered

    def _program(self, key: Hashable, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        if key not in self._programs:
            self._programs[key] = jax.jit(make())
        return self._programs[key]

    def _run(self, block: DecoderBlock) -> Callable[..., jax.Array]:
        apply = self._chain.apply(block)

        def run(leaves: Leaves, factors: dict[str, jax.Array], x: jax.Array) -> jax.Array:
            whole = {p: _dense(_scaled(leaf, factors[p]) if p in factors else leaf) for p, leaf in leaves.items()}
            return apply(whole, x)

        return run

    def _forward(self, block: DecoderBlock) -> Callable[..., jax.Array]:
        return self._program((block.kind, "forward"), lambda: self._run(block))

    def _backward(self, block: DecoderBlock) -> Callable[..., tuple[dict[str, jax.Array], jax.Array]]:
        run = self._run(block)

        def back(leaves: Leaves, factors: dict[str, jax.Array], x: jax.Array, given: jax.Array) -> Any:
            return jax.vjp(lambda f, x: run(leaves, f, x), factors, x)[1](given)

        return self._program((block.kind, "backward"), lambda: back)

    def _compare(self, block: DecoderBlock, gradient: bool) -> Callable[..., Any]:
        """The summed divergence at the head; with its gradients by the factors and by what goes in."""
        run = self._run(block)

        def loss(factors: Any, x: jax.Array, leaves: Leaves, floats: Leaves, target: jax.Array) -> jax.Array:
            want = jax.nn.log_softmax(run(floats, {}, target).astype(jnp.float32))
            have = jax.nn.log_softmax(run(leaves, factors, x).astype(jnp.float32))
            return (jnp.exp(want) * (want - have)).sum()

        def compare(leaves: Leaves, factors: Any, floats: Leaves, x: jax.Array, target: jax.Array) -> Any:
            if not gradient:
                return loss(factors, x, leaves, floats, target)
            value, (by_factors, by_x) = jax.value_and_grad(loss, (0, 1))(factors, x, leaves, floats, target)
            return value, by_factors, by_x

        return self._program((block.kind, "compare", gradient), lambda: compare)


def _tunable(leaf: Weight) -> bool:
    """Packed, or a norm's weight or a bias."""
    return isinstance(leaf, QuantizedTensor) or (leaf.ndim == 1 and jnp.issubdtype(leaf.dtype, jnp.floating))


def _scaled(leaf: Weight, change: jax.Array) -> Weight:
    """A leaf times ``1 + change``, in float32: a packed one's scales ``[*B, G, N]``."""
    if not isinstance(leaf, QuantizedTensor):
        return leaf.astype(jnp.float32) * (1 + change)
    scales = jnp.asarray(leaf.scales, jnp.float32) * (1 + change)
    offsets = None if leaf.offsets is None else jnp.asarray(leaf.offsets, jnp.float32) * (1 + change)
    return dataclasses.replace(leaf, scales=scales, offsets=offsets)


def _as_before(new: Weight, leaf: Weight) -> Weight:
    """``new``, with what was changed in the dtypes of ``leaf``."""
    if not isinstance(new, QuantizedTensor) or not isinstance(leaf, QuantizedTensor):
        return jnp.asarray(new).astype(leaf.dtype)
    like = {n: getattr(leaf, n) for n in ("scales", "offsets") if getattr(leaf, n) is not None}
    return dataclasses.replace(new, **{n: getattr(new, n).astype(a.dtype) for n, a in like.items()})


def _dense(leaf: Weight) -> jax.Array:
    """As float32: sums of many small changes are lost in 16 bits."""
    if isinstance(leaf, QuantizedTensor):
        return leaf.dequantize(jnp.float32)
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def same_length(batches: Sequence[np.ndarray]) -> np.ndarray:
    """The sequences of batches ``[B, T]`` as one array: those of the length that most have."""
    lengths = [b.shape[1] for b in batches for _ in range(len(b))]
    most = max(set(lengths), key=lengths.count)
    return np.concatenate([b for b in batches if b.shape[1] == most])
