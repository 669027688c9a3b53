"""Quantization calibrated on images and text: the statistics of the whole model at once.

Images change more than what the next layer reads, so `awq_jax.stream.session` does not see them.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from awq_jax import paths
from awq_jax.calibration.calibration import calibrate
from awq_jax.config import AwqConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.vision.config import TOWER
from awq_jax.plan.discover import discover
from awq_jax.plan.plan import Plan
from awq_jax.plan.verify import verify
from awq_jax.progress import Progress
from awq_jax.quantizer import quantize as quantizer
from awq_jax.report import Report


def quantize(
    apply: Callable[..., jax.Array],
    params: nnx.State,
    architecture: ModelConfig,
    batches: Sequence[Mapping[str, Any]],
    config: AwqConfig,
    progress: Progress,
) -> tuple[nnx.State, Report]:
    """Quantize ``params`` with the statistics of ``batches`` (see `awq_jax.serve.calibration_batches`).

    Returns:
      (parameters with packed weights, what was done).
    """
    start = time.perf_counter()
    found = verify(plan(apply, params, architecture), apply, params, **batches[0])
    head = config.quantize_head
    calibration = calibrate(apply, params, batches, plan=found, verified=True, include_head=head, progress=progress)
    calibrated = time.perf_counter() - start
    params, report = quantizer.quantize(params, calibration, config, progress=progress, return_report=True)
    report.seconds["calibrate"] = calibrated
    return params, report


def plan(apply: Callable[..., jax.Array], params: nnx.State, architecture: ModelConfig) -> Plan:
    """What `awq_jax.discover` finds in the decoder, with the linears that look at images left float.

    Args:
      apply: ``apply(params, tokens)``.
      params: the state, or its shapes.
      architecture: of the model.
    """
    example = jax.ShapeDtypeStruct((1, min(8, architecture.max_length)), jnp.int32)
    found = discover(apply, params, example)
    towers = {p: TOWER for p in paths.flatten(params) if p.startswith("vision/") and p.endswith("/kernel")}
    return dataclasses.replace(found, skipped={**found.skipped, **towers})
