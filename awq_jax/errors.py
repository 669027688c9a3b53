"""Every error awq_jax raises on bad input. Each message names the culprit and the remedy."""

from __future__ import annotations


class AwqError(Exception):
    """Base class: catch this to catch everything the library raises on purpose."""


class ConfigError(AwqError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class ShapeError(AwqError, ValueError):
    """A tensor's shape does not fit the model, the group size or another tensor."""


class WeightError(AwqError, ValueError):
    """A weight is unusable: NaN, inf, missing, or of an unexpected dtype."""


class CalibrationError(AwqError, ValueError):
    """Calibration data or statistics are unusable: empty, wrong tokens, wrong model."""


class PlanError(AwqError, ValueError):
    """A plan does not describe the given parameters, or does not preserve the output."""


class CheckpointError(AwqError, ValueError):
    """A checkpoint cannot be read: truncated, corrupt, unsafe, or incomplete."""


class FormatError(CheckpointError):
    """A checkpoint format is unknown, or cannot hold what it is asked to hold."""


class UnsupportedModelError(AwqError, ValueError):
    """The architecture is not one the library knows."""


class BackendError(AwqError, RuntimeError):
    """An explicitly chosen kernel cannot run here."""


class ProcessError(AwqError, RuntimeError):
    """Another process of the same run has ended, so that this one cannot go on."""
