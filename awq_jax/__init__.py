"""AWQ 4-bit quantization for JAX and Flax: calibrate, quantize, serve, convert."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from awq_jax._version import __version__ as __version__

_PUBLIC = {
    "AwqConfig": "config",
    "Budget": "config",
    "Calibration": "calibration.calibration",
    "Plan": "plan.plan",
    "QuantizedTensor": "qtensor",
    "Report": "report",
    "allocate": "budget.allocate",
    "bind": "trace.bind",
    "cache_programs": "devices.compile_cache",
    "calibrate": "calibration.calibration",
    "discover": "plan.discover",
    "dot": "serve.dot",
    "load": "serve.model",
    "quantize": "quantizer.quantize",
    "quantize_checkpoint": "stream.run",
    "quantize_sequential": "stream.any_model",
    "tune": "serve.tuning",
}
_MODULES = ("convert", "data", "errors", "evaluate", "keras", "kernels", "linen", "lora", "models", "nnx", "trainable")
_ALIASES = {"partition": "trainable"}  # former names

__all__ = [
    "AwqConfig",
    "Budget",
    "Calibration",
    "Plan",
    "QuantizedTensor",
    "Report",
    "allocate",
    "bind",
    "cache_programs",
    "calibrate",
    "convert",
    "data",
    "discover",
    "dot",
    "errors",
    "evaluate",
    "keras",
    "kernels",
    "linen",
    "load",
    "lora",
    "models",
    "nnx",
    "quantize",
    "quantize_checkpoint",
    "quantize_sequential",
    "trainable",
    "tune",
]

if TYPE_CHECKING:
    from awq_jax import convert as convert
    from awq_jax import data as data
    from awq_jax import errors as errors
    from awq_jax import evaluate as evaluate
    from awq_jax import keras as keras
    from awq_jax import kernels as kernels
    from awq_jax import linen as linen
    from awq_jax import lora as lora
    from awq_jax import models as models
    from awq_jax import nnx as nnx
    from awq_jax import trainable as trainable
    from awq_jax.budget.allocate import allocate as allocate
    from awq_jax.calibration.calibration import Calibration as Calibration
    from awq_jax.calibration.calibration import calibrate as calibrate
    from awq_jax.config import AwqConfig as AwqConfig
    from awq_jax.config import Budget as Budget
    from awq_jax.devices.compile_cache import cache_programs as cache_programs
    from awq_jax.plan.discover import discover as discover
    from awq_jax.plan.plan import Plan as Plan
    from awq_jax.qtensor import QuantizedTensor as QuantizedTensor
    from awq_jax.quantizer.quantize import quantize as quantize
    from awq_jax.report import Report as Report
    from awq_jax.serve.dot import dot as dot
    from awq_jax.serve.model import load as load
    from awq_jax.serve.tuning import tune as tune
    from awq_jax.stream.any_model import quantize_sequential as quantize_sequential
    from awq_jax.stream.run import quantize_checkpoint as quantize_checkpoint
    from awq_jax.trace.bind import bind as bind

    partition = trainable


def __getattr__(name: str) -> object:
    # PEP 562: `import awq_jax` stays cheap; JAX is imported with the first name that needs it.
    # No public function shares its name with a submodule, which would shadow it once imported.
    if name in _PUBLIC:
        module = importlib.import_module(f"awq_jax.{_PUBLIC[name]}")
        return getattr(module, name)
    name = _ALIASES.get(name, name)
    if name in _MODULES:
        return importlib.import_module(f"awq_jax.{name}")
    raise AttributeError(f"module 'awq_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
