"""Every error awq_jax raises on bad input. Each message names the culprit and the remedy."""

import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import NamedTuple


def install(extra: str) -> str:
    """How to get the packages of an extra."""
    return f'pip install "awq-jax[{extra}]", or pip install ".[{extra}]" in its sources'


INSTALL = install("hf")


class Setting(NamedTuple):
    """A setting that a text recommends; as text it is what one passes in Python: ``group_size=-1``.

    ``flag``: the name of its option on the command line, where that is another.
    """

    name: str
    value: bool | int | str
    flag: str = ""

    def __str__(self) -> str:
        return f'{self.name}="{self.value}"' if isinstance(self.value, str) else f"{self.name}={self.value}"

    @property
    def option(self) -> str:
        """What one types on the command line: ``--group-size -1``, ``--overwrite``."""
        flag = f"--{self.flag or self.name.replace('_', '-')}"
        return flag if self.value is True else f"{flag} {self.value}"


class AwqError(Exception):
    """Base class: catch this to catch everything the library raises on purpose.

    Args:
      message: names the culprit and the remedy.
      settings: those that the message recommends.
    """

    def __init__(self, message: str = "", *settings: Setting):
        super().__init__(message)
        self.settings = settings


class ConfigError(AwqError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class ShapeError(AwqError, ValueError):
    """A tensor's shape does not fit the model, the group size or another tensor."""


class ContextLengthError(ShapeError):
    """A prompt and the answer asked for are longer than there is room for."""


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


class MissingPackageError(AwqError, ImportError):
    """What is asked for needs a package that is not installed; the message has the command that installs it."""


class BusyError(AwqError, RuntimeError):
    """An engine has as many requests as it takes; try again later."""


class EngineError(AwqError, RuntimeError):
    """An engine is stopped, or one of its steps failed; the request it ended may be sent again."""


class ProcessError(AwqError, RuntimeError):
    """Another process of the same run has ended, so that this one cannot go on."""


def as_options(text: str, settings: Iterable[Setting]) -> str:
    """``text`` for someone at the command line: ``settings`` are named by their options."""
    for setting in settings:
        text = text.replace(str(setting), setting.option)
    return text


def needed(package: str, what: str) -> ModuleType:
    """The module ``package``, imported.

    Args:
      package: its name.
      what: what needs it, for the message.

    Raises:
      MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as e:
        if e.name != package.partition(".")[0]:
            raise
        raise MissingPackageError(f"{what} needs the package {package.partition('.')[0]}: {INSTALL}") from None
