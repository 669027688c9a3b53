"""Whether what `scaling_plan` says the package holds at each step is what it holds: counted in a small run.

A layer in a 70B's proportions, sixteen times narrower, goes through the package's own `Session` on simulated devices.
Whenever one of the programs of the plan starts, the arrays alive on the first device are added up, each buffer once,
and compared with the plan's list for that step without its program, and with those
of this layer's weights that are packed by then.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import scaling_plan
from jax.sharding import SingleDeviceSharding

from awq_jax import models
from awq_jax.quantizer import column_pieces, quantize, scale_groups, scale_search
from awq_jax.stream.hidden_states import InMemory

SAMPLES, LENGTH, BATCH = 16, 64, 512
PIECE = 512 * 256
PROGRAMS = (
    (scale_groups, "_energy", "energies"),
    (scale_search, "_losses", "losses"),
    (scale_groups, "_prepare", "prepare"),
    (scale_groups, "_prepare_in_place", "prepare"),
    (scale_groups, "_round_piece", "a piece"),
)


class Here(scaling_plan.Compiler):
    """Compiles for the simulated devices."""

    def __init__(self, count: int, device_bytes: int) -> None:
        self.devices, self.name, self._known = tuple(jax.devices()[:count]), "CPU", {}
        self._here = SingleDeviceSharding(self.devices[0])


def alive() -> int:
    """Bytes of arrays on the first device."""
    here, seen = jax.devices()[0], {}
    for a in jax.live_arrays():
        size = math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for s in () if a.is_deleted() else a.addressable_shards:
            if s.device == here:
                seen[s.data.unsafe_buffer_pointer()] = size
    return sum(seen.values())


def run(count: int) -> list[dict[str, Any]]:
    """Step by step: bytes said and bytes alive."""
    hf = dict(scaling_plan.MODELS["70b"], hidden_size=512, intermediate_size=1792, num_hidden_layers=2, vocab_size=512)
    hf |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    small = {"SAMPLES": SAMPLES, "LENGTH": LENGTH, "BATCH_TOKENS_ELSEWHERE": BATCH, "Compiler": Here}
    with mock.patch.multiple(scaling_plan, **small), mock.patch.dict(column_pieces.PIECE, cpu=PIECE):
        plan = scaling_plan.Plans(models.config_from_hf(hf), count, 0)
        said = {s.name: sum(n for k, n in s.holds.items() if k not in ("program", "packed")) for s in plan.steps()}
        found = _watched(plan)
        for i in range(len(plan.shapes)):  # of this layer, what is packed by then
            made = sum(g.k * g.n for g in plan.shapes[:i]) * plan.packed // sum(g.k * g.n for g in plan.shapes)
            for step in ("prepare", "a piece"):
                said[f"round {plan._name(i)}: {step}"] += made
    return [
        {"step": name, "said": said[name], "alive": n, "said_over_alive": said[name] / n} for name, n in found.items()
    ]


def _watched(plan: scaling_plan.Plans) -> dict[str, int]:
    """Name of the step -> bytes alive when its program first started, without what was there before."""
    found: dict[str, int] = {}
    session, names = plan.session, {g.name: plan._name(i) for i, (g, _) in enumerate(plan.work)}
    at, before = ["calibrate"], [0]

    def watch(program: Callable[..., Any], step: str) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            found.setdefault(f"{at[0]}: {step}", alive() - before[0])
            return program(*args, **options)

        return called

    def within(phase: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def called(group: Any, *args: Any) -> Any:
            at[0] = f"{phase} {names[group.name]}"
            return run(group, *args)

        return called

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 512, (SAMPLES, LENGTH)).astype(np.int32)
    rows = BATCH // LENGTH
    states = InMemory([tokens[i : i + rows] for i in range(0, SAMPLES, rows)])
    embed, layer = session.blocks[:2]

    def read(block: Any) -> dict[str, Any]:
        made = {p: rng.standard_normal(s) / 20 + (len(s) == 1) for p, s in block.leaves.items()}
        return {p: jnp.asarray(w, jnp.bfloat16) for p, w in made.items()}

    session.calibrate(embed, read(embed), states, SAMPLES // rows)
    before[0] = alive()
    leaves = read(layer)
    step = session._step
    with contextlib.ExitStack() as stack:
        for module, name, what in PROGRAMS:
            stack.enter_context(mock.patch.object(module, name, watch(getattr(module, name), what)))
        for name, phase in (("find_scale", "search"), ("round_group", "round")):
            stack.enter_context(mock.patch.object(quantize, name, within(phase, getattr(quantize, name))))
        stack.enter_context(mock.patch.object(session, "_step", lambda *a: watch(step(*a), "a batch")))
        stats = session.calibrate(layer, leaves, states, SAMPLES // rows)
        session.quantize(layer, leaves, stats)
    return found
