"""What the rules of engines look at in a checkpoint: its config, and how each of its linears is packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from awq_jax.convert.config_json import HfConfig
from awq_jax.convert.format import Record
from awq_jax.convert.source import Source


@dataclasses.dataclass(frozen=True)
class Linear:
    """A packed linear: its module's name, ``[out, in]`` and how it is packed."""

    name: str
    shape: tuple[int, ...]
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    scales: str

    @property
    def whole(self) -> bool:
        """One scale for a whole column."""
        return self.group_size >= self.shape[-1]


@dataclasses.dataclass(frozen=True)
class Contents:
    """What the rules look at.

    Attributes:
      format: name of it.
      config: ``config.json``.
      linears: that are packed.
      scaled: weights that a scaled activation feeds.
    """

    format: str
    config: HfConfig
    linears: tuple[Linear, ...]
    scaled: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """``model_type``, or ""."""
        kind = self.config.get("model_type")
        return kind if isinstance(kind, str) else ""


def contents(source: Source) -> Contents:
    """Of an open checkpoint, from its headers."""
    linears = []
    for name in source.names():
        info = source.info(name)
        if (p := info.packed) is not None:
            module = name.removesuffix(".weight")
            shape = (info.shape[0], info.shape[-1])
            linears.append(Linear(module, shape, p.bits, p.group_size, p.symmetric, p.act_order, p.scale_dtype))
    return Contents(source.format, source.config, tuple(linears), tuple(getattr(source, "scaled_activations", ())))


def of_records(format: str, config: HfConfig, records: Sequence[Record]) -> Contents:
    """Of a checkpoint that is being written.

    Args:
      format: its name.
      config: ``config.json``.
      records: its tensors, among which scaled activations are not.
    """
    linears = [
        Linear(r.module, (r.shape[0], r.shape[-1]), r.bits, r.group_size, r.symmetric, r.act_order, r.dtype)
        for r in records
        if r.bits
    ]
    return Contents(format, config, tuple(linears))
