"""`finetune`: adapters of a checkpoint, packed or float, trained on rows of text; resumable to the same bytes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from awq_jax.adapters import files
from awq_jax.adapters.files import Adapter
from awq_jax.convert.files.shards import write_json
from awq_jax.errors import CheckpointError, ConfigError, WeightError
from awq_jax.lora import beside, export, loss, rows
from awq_jax.lora.rows import Row
from awq_jax.progress import Progress, bar
from awq_jax.serve.model import Model

ROWS = "rows"  # the axis of the mesh over whose devices rows are split
Batch = dict[str, jax.Array]
STATE, SETTINGS, REPORT = "state.msgpack", "settings.json", "training.json"
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Training:
    """How adapters are trained.

    Attributes:
      rank, alpha, targets, rslora: see `awq_jax.lora.add`.
      steps: of the optimizer.
      batch_size: rows at a time; ``accumulate`` times as many make one step.
      accumulate: see there.
      learning_rate: at its highest: it rises for ``warmup`` of the steps, and falls as a cosine.
      warmup: share of the steps.
      weight_decay: of AdamW.
      clip: of the gradient's global norm.
      dtype: of the factors.
      remat: ``"block"`` or None.
      seed: of the factors and of the order of rows.
      every: steps between held-out losses, and between states on the disk.
      devices: that share the rows of a batch, each with a copy of the weights. Sums are in another order than on one.
    """

    rank: int = 16
    alpha: float | None = None
    targets: str = beside.ALL
    rslora: bool = False
    steps: int = 100
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float = 2e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    dtype: str = "float32"
    remat: str | None = "block"
    seed: int = 0
    every: int = 20
    devices: int = 1

    def __post_init__(self) -> None:
        beside.check(self.rank, self.alpha, "zero", self.remat)
        for name in ("steps", "batch_size", "accumulate", "every", "devices"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.learning_rate > 0 or not 0 <= self.warmup < 1 or not self.clip > 0:
            raise ConfigError("learning_rate and clip must be positive, and warmup a share from 0 to below 1")
        if self.batch_size % self.devices:
            raise ConfigError(f"batch_size {self.batch_size} must be a multiple of the {self.devices} devices")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype of adapters must be float32 or bfloat16; got {self.dtype!r}")

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with a clipped gradient, warm-up and a cosine."""
        schedule = self.schedule()
        return optax.chain(optax.clip_by_global_norm(self.clip), optax.adamw(schedule, weight_decay=self.weight_decay))

    def schedule(self) -> Callable[[Any], Any]:
        """The learning rate by step."""
        rise = max(1, int(self.warmup * self.steps))
        return optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, rise, max(self.steps, rise + 1))


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training did.

    Attributes:
      adapter: the result, in the terms of the base that it was trained on.
      curve: of every ``every`` steps: ``step``, ``loss`` (mean since the last), ``held_out``, ``learning_rate``,
        ``tokens_per_second`` (of this run).
      resumed: steps that an earlier, interrupted run had done.
    """

    adapter: Adapter
    curve: list[dict[str, float]]
    resumed: int = 0


def finetune(
    model: Model,
    training: Training,
    data: Sequence[Row],
    held_out: Sequence[Row] = (),
    *,
    work: Path | None = None,
    base: str = "",
    progress: Progress = True,
) -> Trained:
    """Train adapters of ``model`` on rows.

    Args:
      model: a model of `awq_jax.load`, packed or float; with ``mesh=`` its devices share the weights.
      training: how.
      data, held_out: from `awq_jax.lora.rows.read`.
      work: a directory where the state is kept while it runs; one that is there is continued, to the same bytes.
      base: how the adapter's config calls the base; "": where the model was loaded from.
      progress: show a progress bar on stderr, or a function (see `awq_jax.progress`).

    Raises:
      ConfigError: there are no rows, or a setting does not fit the model or the machine.
      CheckpointError: ``work`` is of another training, or the disk refuses.
      WeightError: the loss is not finite.
    """
    if not data:
        raise ConfigError("there are no rows to train on")
    t = training
    mesh = _mesh(t.devices, model)
    settings: dict[str, Any] = {"rank": t.rank, "alpha": t.alpha, "rslora": t.rslora}
    apply, adapters, frozen = beside.add(
        model, targets=t.targets, dtype=t.dtype, seed=t.seed, remat=t.remat, **settings
    )
    if mesh is not None:
        frozen = jax.device_put(frozen, NamedSharding(mesh, PartitionSpec()))
    optimizer = t.optimizer()
    state: dict[str, Any] = {"step": 0, "adapters": adapters, "moments": optimizer.init(adapters), "curve": "[]"}
    if work is not None:
        state = _opened(work, _fingerprint(t, data, held_out, model), state)
    curve: list[dict[str, float]] = json.loads(state["curve"])
    first = int(state["step"])

    step = stepping(apply, optimizer, mesh)
    summed = jax.jit(functools.partial(loss.summed, apply))
    losses: list[jax.Array] = []
    adapters, moments = state["adapters"], state["moments"]
    tokens, started = 0, time.perf_counter()
    feed = rows.batches(data, t.batch_size, t.accumulate, t.seed, first)
    with bar(progress, "finetune", "step", t.steps) as shown:
        shown.update(first)
        for number in range(first + 1, t.steps + 1):
            batch = next(feed)
            adapters, moments, value = step(adapters, moments, frozen, jax.tree.map(jnp.asarray, batch))
            if losses:
                losses[-1].block_until_ready()  # so that the speed shown is that of the device
            losses.append(value)
            tokens += int(batch["counts"].sum())
            speed = tokens / (time.perf_counter() - started)
            shown.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
            shown.update()
            if number % t.every and number != t.steps:
                continue
            mean = float(np.mean([float(x) for x in losses]))
            if not np.isfinite(mean):
                raise WeightError(f"the loss is not finite at step {number}: lower learning_rate, or train in float32")
            point = {"step": number, "loss": mean, "learning_rate": float(t.schedule()(number))}
            if held_out:
                point["held_out"] = loss.mean(summed, held_out, t.batch_size, adapters, frozen)
            point["tokens_per_second"] = tokens / (time.perf_counter() - started)
            log.info("%s", "  ".join(f"{k} {v:.4g}" for k, v in point.items()))
            curve.append(point)
            losses.clear()
            if work is not None:
                _keep(work, {"step": number, "adapters": adapters, "moments": moments, "curve": json.dumps(curve)})
    return Trained(export.adapter(model, adapters, base=base, **settings), curve, first)


def stepping(
    apply: Callable[..., Any], optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> Callable[[Any, Any, Any, Batch], tuple[Any, Any, jax.Array]]:
    """The compiled step: ``(adapters, moments, frozen, batch) -> (adapters, moments, loss)``.

    Args:
      apply: of `awq_jax.lora.add`.
      optimizer: of which ``moments`` are.
      mesh: whose devices share the rows of a batch.
    """
    gradients = _gradients(apply, mesh)

    @jax.jit
    def step(adapters: Any, moments: Any, frozen: Any, batch: Batch) -> tuple[Any, Any, jax.Array]:
        grads, value = gradients(adapters, frozen, batch)
        tokens = jnp.maximum(batch["counts"].sum(), 1)
        grads = jax.tree.map(lambda g, a: (g / tokens).astype(a.dtype), grads, adapters)
        updates, moments = optimizer.update(grads, moments, adapters)
        return optax.apply_updates(adapters, updates), moments, value / tokens

    return step


def _mesh(devices: int, model: Model) -> Mesh | None:
    """The devices that share the rows; None for one."""
    if devices == 1:
        return None
    if devices > jax.device_count():
        raise ConfigError(f"{devices} devices are asked for, and JAX has {jax.device_count()}")
    if model.mesh is not None:
        raise ConfigError("the model's weights are spread over devices by mesh=; they cannot share its rows, too")
    return Mesh(np.asarray(jax.devices()[:devices]), (ROWS,))


def _gradients(apply: Callable[..., Any], mesh: Mesh | None) -> Callable[[Any, Any, Batch], tuple[Any, jax.Array]]:
    """Gradients and loss of all rows of a batch ``[accumulate, size, T]``, summed."""

    def own(adapters: Any, frozen: Any, batch: Batch) -> tuple[Any, jax.Array]:
        def part(total: tuple[Any, jax.Array], one: Batch) -> tuple[tuple[Any, jax.Array], None]:
            value, grads = jax.value_and_grad(lambda a: loss.summed(apply, one, a, frozen))(adapters)
            return (jax.tree.map(jnp.add, total[0], grads), total[1] + value), None

        none = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), adapters), jnp.zeros(())
        found: tuple[Any, jax.Array] = jax.lax.scan(part, none, batch)[0]
        return found if mesh is None else jax.lax.psum(found, ROWS)

    if mesh is None:
        return own
    everywhere = PartitionSpec()
    split = (everywhere, everywhere, PartitionSpec(None, ROWS))
    return jax.shard_map(own, mesh=mesh, in_specs=split, out_specs=everywhere, check_vma=False)


def _fingerprint(t: Training, data: Sequence[Row], held_out: Sequence[Row], model: Model) -> dict[str, Any]:
    """What a state belongs to."""
    digest = hashlib.sha256()
    for row in (*data, *held_out):
        digest.update(row.ids.tobytes() + row.counts.tobytes())
    told = {"rows": digest.hexdigest(), "model": repr(model), "scales": model.folded_digest(), "jax": jax.__version__}
    return dataclasses.asdict(t) | told


def _opened(work: Path, settings: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """The state of an unfinished training, or ``state`` for a new one."""
    work.mkdir(parents=True, exist_ok=True)
    if (work / SETTINGS).is_file():
        before = json.loads((work / SETTINGS).read_text())
        if changed := sorted(k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k)):
            raise CheckpointError(
                f"{work} holds an unfinished training with other {', '.join(changed)}: give the same, or remove it"
            )
    else:
        write_json(work / SETTINGS, settings)
    if not (work / STATE).is_file():
        return state
    try:
        return dict(flax.serialization.from_bytes(state, (work / STATE).read_bytes()))
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{work / STATE} is damaged ({e}); remove {work} to begin anew") from None


def _keep(work: Path, state: dict[str, Any]) -> None:
    """The state on the disk: whole, or the one before."""
    partial = work / f"{STATE}.partial"
    with partial.open("wb") as f:
        f.write(flax.serialization.to_bytes(jax.device_get(state)))
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, work / STATE)


def write(trained: Trained, dst: Path, work: Path, overwrite: bool = False) -> None:
    """The adapter as PEFT's directory with the curve beside it; what was kept on the way is removed.

    Raises:
      CheckpointError: ``dst`` exists, or the disk refuses.
    """
    files.write(trained.adapter, dst, overwrite)
    write_json(dst / REPORT, {"curve": trained.curve})
    shutil.rmtree(work, ignore_errors=True)
