"""Layers whose activations are made again in the backward pass instead of being kept."""

import jax
from flax import nnx

from awq_jax.models.decoder import Layer
from awq_jax.models.layers.attention import Step
from awq_jax.models.layers.cache import Past


def call(layer: Layer, x: jax.Array, step: Step, past: Past | None) -> tuple[jax.Array, Past]:
    """``layer(x, step, past)`` of which only what goes in is kept for the gradient; for `Decoder.hidden`."""
    graphdef, state = nnx.split(layer)
    angles = step.angles

    @jax.checkpoint
    def run(
        state: nnx.State, x: jax.Array, positions: jax.Array, turns: list[tuple[jax.Array, jax.Array]]
    ) -> tuple[jax.Array, Past]:
        own: Layer = nnx.merge(graphdef, state)
        inner = Step(positions, dict(zip(angles, turns, strict=True)), step.decoding, step.blocks)
        return own(x, inner, past)

    return run(state, x, step.positions, list(angles.values()))
