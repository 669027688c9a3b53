"""Low-rank adapters (arXiv 2106.09685): trained on packed weights, or on the float model and rescaled for them.

AWQ folds scales: ``x W = (x / s)(diag(s) W)``, and a layer of the quantized model reads x / s. What a float-trained
adapter adds, ``(x A) B``, is then another product. `load` knows the s that our checkpoints keep.
"""

from __future__ import annotations

from pathlib import Path

from awq_jax.adapters import base as bases
from awq_jax.adapters import files
from awq_jax.adapters.files import Adapter, Factors
from awq_jax.convert.source import Source
from awq_jax.lora.beside import add
from awq_jax.lora.error_init import Original
from awq_jax.lora.export import adapter, factors
from awq_jax.lora.merging import Requantized, merge, requantize
from awq_jax.lora.recovery import Recovered, recover

__all__ = [
    "Adapter",
    "Factors",
    "Original",
    "Recovered",
    "Requantized",
    "adapter",
    "add",
    "factors",
    "load",
    "merge",
    "recover",
    "requantize",
    "save",
]


def load(directory: str | Path, *, base: str | Path | Source | None = None, terms: str = "auto") -> Adapter:
    """An adapter from PEFT's files, in the terms of the base that it is to be served on.

    Args:
      directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
      base: a checkpoint: directory, ``.gguf`` file, hub id, or open source. None: the factors as they are.
      terms: whose inputs the factors were trained on: ``"float"``, the float model's: they are rescaled by what is
        folded into the base; ``"base"``, this base's; ``"auto"``: as the adapter's config says. One that says nothing
        was trained on the base if that is its ``base_model_name_or_path``, and else on the float model.

    Raises:
      CheckpointError: a file is missing or damaged; the adapter was trained on a base with other folded scales; or the
        base is an AWQ checkpoint of another maker, which does not keep them.
      FormatError: it is an adapter that cannot be served here; named, with the remedy.
      WeightError: a factor holds NaN or inf.
    """
    adapter = files.read(directory)
    return adapter if base is None else bases.fitted(adapter, bases.of(base), terms)


def save(adapter: Adapter, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write an adapter as PEFT and vLLM read it; all of it or nothing.

    Raises:
      CheckpointError: ``directory`` exists, or the disk refuses.
    """
    files.write(adapter, directory, overwrite)
