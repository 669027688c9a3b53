"""`Source`: any checkpoint as Hugging Face tensor names, a config and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from awq_jax.convert.safetensors_io import SafetensorsDir, read_json
from awq_jax.errors import CheckpointError
from awq_jax.qtensor import QuantizedTensor

# Besides weights and config.json, what makes a checkpoint directory usable. Never code, never pickles.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class Source(Protocol):
    """A checkpoint opened for reading; tensors are read when asked for.

    Attributes:
      format: ``"hf"``, ``"gguf"``, ``"awq-gemm"`` or ``"awq-jax"``.
      config: content of ``config.json`` (synthesised for GGUF).
      generation_config: content of ``generation_config.json``, or ``{}``.
    """

    format: str
    config: dict[str, Any]
    generation_config: dict[str, Any]

    def names(self) -> list[str]:
        """Hugging Face tensor names; a packed linear appears once, as ``<module>.weight``."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in PyTorch's orientation (a linear is ``[out, in]``)."""

    def read(self, name: str) -> np.ndarray | QuantizedTensor:
        """The tensor, in host memory.

        A packed linear is a `QuantizedTensor` of NumPy arrays with ``axes="nk"``. AutoAWQ's layout
        does not say what dtype a weight stands for, so it is ``"float32"`` there: exact.

        Raises:
          CheckpointError: if it is absent or damaged.
        """

    def tokenizer(self) -> Any:
        """A transformers ``PreTrainedTokenizerFast``, or None if the checkpoint has none."""

    def companions(self) -> list[Path]:
        """Files to copy along with the weights (tokenizer, generation config)."""


class DirectorySource:
    """What directory formats share: config, tokenizer, and float tensors from safetensors."""

    format = "hf"

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        self.directory = directory
        self.config = config
        generation = directory / "generation_config.json"
        self.generation_config: dict[str, Any] = read_json(generation) if generation.is_file() else {}
        self.files = SafetensorsDir(directory)

    def names(self) -> list[str]:
        return self.files.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files.entry(name).shape

    def read(self, name: str) -> np.ndarray | QuantizedTensor:
        return self.files.read(name)

    def tokenizer(self) -> Any:
        from awq_jax import tokenizer  # transformers takes seconds to import

        return tokenizer.from_directory(self.directory)

    def companions(self) -> list[Path]:
        return [p for p in (self.directory / name for name in COMPANIONS) if p.is_file()]


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a directory.

    Raises:
      CheckpointError: if it is absent or not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json; is it a Hugging Face checkpoint directory?")
    return read_json(path)
