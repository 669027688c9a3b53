"""Quantization calibrated on images and text: the statistics of the whole model at once.

Images change more than what the next layer reads, so `awq_jax.stream.session` does not see them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from awq_jax import calibrate
from awq_jax import quantize as quantize_params
from awq_jax.config import AwqConfig
from awq_jax.errors import CalibrationError
from awq_jax.models.config import ModelConfig
from awq_jax.models.plans import plan as plan_of
from awq_jax.models.vision import inputs as vision
from awq_jax.plan.verify import verify
from awq_jax.report import Report
from awq_jax.serve.generate import check_tokens


def quantize(
    apply: Callable[..., jax.Array],
    params: Any,
    architecture: ModelConfig,
    batches: list[Any],
    config: AwqConfig,
    progress: bool,
) -> tuple[Any, Report]:
    """Quantize ``params`` with the statistics of ``batches`` (see `unpadded`).

    Returns:
      (parameters with packed weights, what was done).
    """
    start = time.perf_counter()
    plan = verify(plan_of(apply, params, architecture), apply, params, **batches[0])
    head = config.quantize_head
    calibration = calibrate(apply, params, batches, plan=plan, verified=True, include_head=head, progress=progress)
    calibrated = time.perf_counter() - start
    params, report = quantize_params(params, calibration, config, progress=progress, return_report=True)
    report.seconds["calibrate"] = calibrated
    return params, report


def unpadded(architecture: ModelConfig, batch: Mapping[str, Any], number: int) -> dict[str, np.ndarray]:
    """Arguments of the model from what a processor returned, which must be without padding.

    Args:
      architecture: of the model.
      batch: see `awq_jax.models.vision.inputs.inputs`.
      number: of the batch, for the errors.

    Raises:
      CalibrationError: rows of several lengths, or longer than the context.
      ConfigError, ShapeError: see `awq_jax.models.vision.inputs.inputs`.
    """
    arrays, lengths = vision.inputs(architecture, batch)
    tokens = arrays["input_ids"]
    if (lengths < tokens.shape[1]).any() or tokens.shape[1] > architecture.max_length:
        raise CalibrationError(
            f"batch {number} has rows of {lengths.tolist()} tokens: padding would be calibrated on, and the "
            f"model's context is {architecture.max_length}; pass what the processor returns for one sample at a time"
        )
    check_tokens(vision.of_images(architecture, tokens), architecture.vocab_size, f"batch {number}")
    return arrays
