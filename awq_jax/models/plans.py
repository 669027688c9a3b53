"""The scale groups of a model of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from awq_jax import paths
from awq_jax.models.config import ModelConfig
from awq_jax.plan.discover import discover
from awq_jax.plan.plan import Plan

TOWER = "looks at images: towers and projectors stay float"


def plan(apply_fn: Callable[..., Any], params: Any, config: ModelConfig) -> Plan:
    """What `awq_jax.discover` finds in the decoder, with what looks at images left float.

    Args:
      apply_fn: ``apply_fn(params, tokens)``.
      params: the state, or its shapes.
      config: architecture.
    """
    example = jax.ShapeDtypeStruct((1, min(8, config.max_length)), jnp.int32)
    found = discover(apply_fn, params, example)
    towers = {p: TOWER for p in paths.flatten(params) if p.startswith("vision/") and p.endswith("/kernel")}
    return dataclasses.replace(found, skipped={**found.skipped, **towers})
