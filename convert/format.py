"""What a checkpoint format is: a reader, an encoder, and a line on what it can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from awq_jax.config import AwqConfig
from awq_jax.convert.config_json import HfConfig, JsonObject
from awq_jax.convert.source import Source
from awq_jax.qtensor import QuantizedTensor
from awq_jax.report import FoldedScale

Stored = tuple[dict[str, np.ndarray], dict[str, str]]
"""What is stored for a packed weight: arrays by name, and header metadata."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What was written for one tensor; plain data, so that it can be kept in a manifest.

    Attributes:
      name: Hugging Face name.
      shape: in PyTorch's orientation.
      dtype: of a float tensor as stored; of a packed one, of its scales.
      bits: 0 for a float tensor.
      group_size: 0 for a float tensor.
      symmetric, act_order: of a packed tensor as stored.
      nbytes: bytes of all that is stored for it.
      deviation: largest difference between what is stored and what was read, in quantization steps
        of the latter (0 for exact; for a float tensor relative to the largest value).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bits: int = 0
    group_size: int = 0
    symmetric: bool = False
    act_order: bool = False
    nbytes: int = 0
    deviation: float = 0.0

    @classmethod
    def from_json(cls, fields: JsonObject) -> Record:
        """The record whose fields JSON has kept, ``shape`` as a list."""
        return cls(**{**fields, "shape": tuple(fields["shape"])})

    @property
    def module(self) -> str:
        """The name without ``.weight``."""
        return self.name.removesuffix(".weight")


@dataclasses.dataclass(frozen=True)
class Destination:
    """What an encoder may want to know about the checkpoint it writes.

    Attributes:
      config: the source's ``config.json``.
      dtype: of float tensors, ``"float32"``, ``"bfloat16"``, ``"float16"``; None keeps each one's own.
      settings: the quantizer's, if known.
      made: how the weights were quantized, for the model card (see `awq_jax.convert.card.of_report`).
      scales: what was folded into the weights since they were the source's, by module; None: nothing was quantized.
    """

    config: HfConfig = dataclasses.field(default_factory=dict)
    dtype: str | None = None
    settings: AwqConfig | None = None
    made: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scales: Mapping[str, FoldedScale] | None = None


class Encoder(Protocol):
    """How a format stores tensors. Stateless: what it must know of other tensors it gets as records.

    Attributes:
      destination: the checkpoint it writes.
    """

    destination: Destination

    def fit(self, name: str, q: QuantizedTensor) -> QuantizedTensor | None:
        """The nearest weight the format can hold.

        ``q`` itself (the same object) where it can be held as it is; a changed one where not, whose
        deviation the caller measures and judges; None if the format keeps this tensor float.

        Args:
          name: Hugging Face name.
          q: one matrix of NumPy arrays, ``axes="nk"`` unless it has batch axes.

        Raises:
          FormatError: if there is none; it names the tensor, the reason and the remedy.
        """

    def encode(self, name: str, q: QuantizedTensor) -> Stored:
        """What to store for a weight that `fit` returned."""

    def encode_float(self, name: str, value: np.ndarray) -> dict[str, np.ndarray]:
        """What to store for a float tensor."""

    def config(self, records: Sequence[Record]) -> JsonObject | None:
        """Entries to set in ``config.json``, usually ``{"quantization_config": {...}}``.

        Raises:
          FormatError: if the tensors do not go together in this format.
        """


class BaseEncoder:
    """Defaults of an `Encoder`: float tensors are stored under their names."""

    def __init__(self, destination: Destination = Destination()) -> None:
        self.destination = destination

    def encode_float(self, name: str, value: np.ndarray) -> dict[str, np.ndarray]:
        """The tensor under its name."""
        return {name: value}

    def config(self, records: Sequence[Record]) -> JsonObject | None:
        """Nothing to add."""
        return None


class Sink(Protocol):
    """Where encoded tensors go. One per checkpoint written."""

    def add(self, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
        """Take the arrays that are stored for one tensor."""

    def close(self, config: JsonObject) -> Path:
        """All tensors have been added; ``config`` is the final ``config.json``. Returns what to rename."""


@dataclasses.dataclass(frozen=True)
class Example:
    """What weights a format's own tools usually write; see `awq_jax.convert.exactness`.

    Attributes:
      form: whole ``zeros``, ``symmetric``, or float ``offsets``; ``scaled zeros``: offsets that are whole zero
        points times the scale as stored (AutoAWQ, llm-awq); ``edges``: scales of either sign, and as offset the end
        of the range that is further from 0, a whole number of steps away until both are rounded (MLX).
    """

    form: Literal["zeros", "symmetric", "offsets", "scaled zeros", "edges"] = "zeros"
    bits: int = 4
    group_size: int = 128
    scale_dtype: str = "float16"


@dataclasses.dataclass(frozen=True)
class Format:
    """One checkpoint format.

    Attributes:
      name: what ``--to`` calls it.
      title: whose it is and where it runs.
      holds: what weights it can hold, in words.
      matches: whether a directory with this ``config.json`` and these tensor names is in the format.
      reader: opens such a directory; None if it is only written, or read from something else.
      encoder: makes the encoder of a checkpoint; None if it is only read.
      sink: for a container other than sharded safetensors: makes it, in an empty directory, for a
        destination and the source (whose tokenizer it may need).
      suffix: what a path must end with if it is a file (``".gguf"``), else "".
      example: what its own tools usually write; None if it is not a quantized format.
    """

    name: str
    title: str
    holds: str
    matches: Callable[[HfConfig, Collection[str]], bool]
    reader: Callable[[Path, JsonObject], Source] | None
    encoder: Callable[[Destination], Encoder] | None
    sink: Callable[[Path, Destination, Source], Sink] | None = None
    suffix: str = ""
    example: Example | None = Example()


def quant_method(config: HfConfig) -> str:
    """``quantization_config.quant_method`` of a ``config.json`` in lower case, or ""."""
    quant = config.get("quantization_config")
    method = quant.get("quant_method") if isinstance(quant, dict) else None
    return "" if method is None else str(method).lower()


def named(name: str, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a packed weight ``<module>.weight`` by their full names, ``<module>.<part>``."""
    module = name.removesuffix(".weight")
    return {f"{module}.{part}": array for part, array in arrays.items()}
