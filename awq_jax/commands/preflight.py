"""What can go wrong with a quantization, found out before any weight is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from awq_jax import models, select
from awq_jax.commands import common
from awq_jax.config import AwqConfig
from awq_jax.convert import registry
from awq_jax.convert.source import Source
from awq_jax.errors import CheckpointError, ConfigError, FormatError
from awq_jax.models import params as model_params
from awq_jax.models import plans
from awq_jax.plan import Plan

FLOAT_FORMATS = ("hf", "gguf")


def check(src: str, dst: Path, config: AwqConfig, format: str) -> tuple[Source, models.ModelConfig]:
    """Open ``src`` and make sure that it can be quantized to ``dst`` in ``format``.

    Returns:
      The source, and its architecture.

    Raises:
      CheckpointError: if ``src`` cannot be read, or the disk of ``dst`` is too small.
      UnsupportedModelError: if the decoder does not have this architecture.
      ConfigError: if ``src`` is quantized already.
      ShapeError: listing the weights that the group size does not divide.
      FormatError: if ``format`` is gemm and the outputs of a weight are not a multiple of 8.
    """
    source = registry.open_source(src)
    if Path(src).expanduser().resolve() == dst.expanduser().resolve():
        raise CheckpointError(f"{dst} is the source; choose another target")
    architecture = models.config_of(source)
    if source.format not in FLOAT_FORMATS:
        raise ConfigError(f"{src} is quantized already ({source.format}); give the float checkpoint")
    targets, _ = select.select(plan(architecture), config)
    narrow = [path for path, t in targets.items() if math.prod(t.site.shape) // t.k % 8]
    if format == "gemm" and narrow:
        raise FormatError(
            f"format gemm needs outputs in multiples of 8; not so: {', '.join(narrow)}; use --format awq-jax, or --skip"
        )
    least = min(config.bits, *(change.get("bits", config.bits) for _, change in config.overrides), 16)
    common.check_space(dst, sum(math.prod(source.shape(name)) for name in source.names()) * least / 8)
    return source, architecture


def plan(architecture: models.ModelConfig) -> Plan:
    """The scale groups of an architecture, discovered without its weights."""
    graphdef, state = model_params.abstract(architecture)

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(tokens)

    return plans.plan(apply, state, architecture)
