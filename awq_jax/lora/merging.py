"""An adapter added into the weights: a float model, to be quantized anew."""

from __future__ import annotations

from typing import Any

from awq_jax import paths
from awq_jax.errors import ConfigError
from awq_jax.qtensor import QuantizedTensor
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
