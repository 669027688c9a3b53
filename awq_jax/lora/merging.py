"""An adapter added into the weights: a float model, which may be quantized anew."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from awq_jax import paths
from awq_jax.errors import ConfigError
from awq_jax.lora import loss
from awq_jax.lora.rows import Row
from awq_jax.progress import Progress
from awq_jax.qtensor import QuantizedTensor
from awq_jax.report import Report
from awq_jax.serve.model import Model


def merge(model: Model, adapter: str | None = None) -> None:
    """Add the factors of one adapter into the weights of ``model``, in place; packed ones become float.

    Rounding the sum to the grid of the packed weights would lose most of what was learnt: quantize it anew.

    Args:
      model: of `awq_jax.load` with ``adapter=``.
      adapter: the name of one; None: that which was given without a name.

    Raises:
      ConfigError: there is no such adapter.
    """
    if not model.adapters:
        raise ConfigError("the model was loaded without an adapter; pass adapter= to awq_jax.load")

    def dense(_: str, leaf: Any) -> Any:
        return leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf

    model.params = paths.map_with_path(dense, model.adapted(adapter).params)
    model.detach()


@dataclasses.dataclass(frozen=True)
class Requantized:
    """What merging and quantizing did.

    Attributes:
      report: of the quantization.
      beside: loss on the held-out rows with the adapter beside the weights, in nats; None without such rows.
      merged: the same of the quantized sum.
    """

    report: Report
    beside: float | None
    merged: float | None


def requantize(
    model: Model,
    data: Sequence[Row],
    held_out: Sequence[Row] = (),
    *,
    adapter: str | None = None,
    batch_size: int = 4,
    progress: Progress = True,
    **settings: Any,
) -> Requantized:
    """Merge an adapter and quantize the sum anew, in place, calibrated on the text that the adapter was trained on.

    Args:
      model: of `awq_jax.load` with ``adapter=``; its weights are float on the way.
      data: rows of `awq_jax.lora.rows.read`; those that it is calibrated on are drawn from them.
      held_out: rows to measure the loss on, before and after.
      adapter: see `merge`.
      batch_size: rows at a time where the loss is measured.
      progress: see `awq_jax.progress`.
      **settings: of `awq_jax.serve.model.Model.quantize`.

    Raises:
      ConfigError: there are no rows, or no such adapter; or a bad setting.
      CalibrationError, ShapeError: see `awq_jax.serve.model.Model.quantize`.
    """
    if not data:
        raise ConfigError("there are no rows to calibrate on")
    total = jax.jit(functools.partial(loss.summed, model.apply))
    before = loss.mean(total, held_out, batch_size, model.adapted(adapter).params) if held_out else None
    merge(model, adapter)
    report = model.quantize([row.ids.tolist() for row in data], progress=progress, **settings)
    after = loss.mean(total, held_out, batch_size, model.params) if held_out else None
    return Requantized(report, before, after)
