"""What `awq-jax inspect --plan` shows of a checkpoint that nothing has been read of but its config."""

from __future__ import annotations

from awq_jax import blocks, models
from awq_jax.plan import Plan


def plan(architecture: models.ModelConfig) -> Plan:
    """The scale groups of an architecture, found without its weights, as quantization uses them."""
    return blocks.Chain(architecture).plan()
