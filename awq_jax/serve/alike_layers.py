"""Layers that are alike, traced and lowered once.

A decoder's layers are unrolled, and tracing each of them anew takes longer than reading the compiled program from a
cache. Results are the same to the bit (tests/serve/test_start.py).
"""

import functools

import jax
from flax import nnx

from awq_jax.models.config import RopeConfig
from awq_jax.models.decoder import Layer
from awq_jax.models.layers.attention import Step
from awq_jax.models.layers.cache import Past

Angles = tuple[jax.Array, jax.Array]


def call(layer: Layer, x: jax.Array, step: Step, past: Past | None) -> tuple[jax.Array, Past]:
    """``layer(x, step, past)``, within a trace."""
    return call_split(*nnx.split(layer), x, step, past)


def call_split(
    graphdef: nnx.GraphDef, state: nnx.State, x: jax.Array, step: Step, past: Past | None
) -> tuple[jax.Array, Past]:
    """`call` of a layer that is split already; outside of a trace it is a program of its own."""
    return _layer(*_arguments(graphdef, state, x, step, past))


def lower(graphdef: nnx.GraphDef, state: nnx.State, x: jax.Array, step: Step) -> jax.stages.Lowered:
    """The program of `call_split` for a prompt, of arrays or of their shapes."""
    return _layer.lower(*_arguments(graphdef, state, x, step, None))


def _arguments(
    graphdef: nnx.GraphDef, state: nnx.State, x: jax.Array, step: Step, past: Past | None
) -> tuple[object, ...]:
    ropes, angles = tuple(step.angles), tuple(step.angles.values())
    return graphdef, ropes, step.decoding, state, x, step.positions, angles, step.blocks, past


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _layer(
    graphdef: nnx.GraphDef,
    ropes: tuple[RopeConfig, ...],
    decoding: bool,
    state: nnx.State,
    x: jax.Array,
    positions: jax.Array,
    angles: tuple[Angles, ...],
    blocks: jax.Array | None,
    past: Past | None,
) -> tuple[jax.Array, Past]:
    step = Step(positions, dict(zip(ropes, angles, strict=True)), decoding, blocks)
    layer: Layer = nnx.merge(graphdef, state)
    return layer(x, step, past)
