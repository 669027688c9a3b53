"""Calibration data as batches: of tokens, or of the arrays that a processor makes of images and text."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, cast

import numpy as np

from awq_jax import data
from awq_jax.convert.text import TokenizerLike
from awq_jax.errors import CalibrationError
from awq_jax.models.config import ModelConfig
from awq_jax.models.vision import inputs as vision
from awq_jax.serve.generate import check_tokens
from awq_jax.stream.job import say_if_cut


def are_images(calib: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether that is a list of what a processor returned, with ids ``[B, T]``, and not rows of a data set."""
    if not isinstance(calib, Sequence) or not calib or not all(isinstance(b, Mapping) for b in calib):
        return False
    return "pixel_values" in calib[0] or np.ndim(calib[0].get("input_ids")) == 2


def of_text(
    architecture: ModelConfig,
    tokenizer: TokenizerLike | None,
    calib: object,
    samples: int,
    seq_len: int,
    seed: int,
    column: str | None,
    bos: str,
) -> data.CalibrationSet:
    """Tokens; the arguments are those of `awq_jax.serve.model.Model.quantize`.

    Raises:
      CalibrationError: see `awq_jax.data.load`.
    """
    found = data.load(
        cast(data.CalibrationSource, calib),  # `load` refuses what is not
        tokenizer,
        samples=samples,
        seq_len=min(seq_len, architecture.max_length),
        vocab_size=architecture.vocab_size,
        seed=seed,
        column=column,
        bos=bos,
    )
    say_if_cut(architecture, seq_len)
    return found


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
