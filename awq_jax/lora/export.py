"""Adapters of a model of `awq_jax.load`, between the tree that is trained and PEFT's files."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from awq_jax.adapters import attach, files
from awq_jax.adapters import base as bases
from awq_jax.adapters.files import Adapter, Factors
from awq_jax.errors import ConfigError
from awq_jax.lora.beside import Adapters, by_path, nested, scaled, unscaled
from awq_jax.models.weights import modules
from awq_jax.report import FoldedScale
from awq_jax.serve.model import Model

UNSCALED = FoldedScale(None, None)


def adapter(
    model: Model, adapters: Adapters, *, rank: int, alpha: float | None = None, rslora: bool = False, base: str = ""
) -> Adapter:
    """What `awq_jax.lora.add` made for ``model``, as PEFT and vLLM read it; `awq_jax.lora.save` writes it.

    The factors are in the terms of the model's weights: multiplied by the scales that are folded into them.

    Args:
      model: that the adapters were trained on; the scales that are folded into it are named in the adapter's config.
      adapters: trained factors.
      rank, alpha, rslora: as they were given to `awq_jax.lora.add`.
      base: how to call the base; "": where the model was loaded from.

    Raises:
      ConfigError: a factor is of a parameter that no module of the checkpoint holds alone.
    """
    found, folded = by_path(adapters), model.folded_scales()
    scale = _scale(rank, alpha, rslora)
    every = list(modules.linears(model.config))
    factors: dict[str, Factors] = {}
    for linear in every:
        own = found.get(linear.path)
        if own is None:
            continue
        if linear.part is not None or (linear.expert is None and len(linear.shape) > 2):
            raise ConfigError(
                f"{linear.module} holds more than the parameter {linear.path}: PEFT has no adapter for a part of a "
                "module; choose other targets"
            )
        a, b = (np.asarray(own[name], np.float32) for name in ("lora_a", "lora_b"))
        a, b = scaled(a, b, folded.get(linear.path, UNSCALED))
        if linear.expert is not None:
            a, b = a[linear.expert], b[linear.expert]
        factors[linear.module] = Factors(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), scale)
    known = bases.of(model.source)
    name = base or known.name
    config = files.config_of(factors, [linear.module for linear in every], name, rslora)
    return Adapter(factors, config).told(name, model.folded_digest())


def factors(model: Model, adapter: Adapter, *, rank: int, alpha: float | None = None, rslora: bool = False) -> Adapters:
    """The inverse: the tree that `awq_jax.lora.add` takes on training from, for an adapter of one rank.

    Raises:
      ConfigError: it has another rank.
      FormatError, ShapeError: it does not fit the model.
    """
    if any(f.rank != rank for f in adapter.factors.values()):
        raise ConfigError(f"{adapter.name} has rank {adapter.rank}, not {rank}")
    scale = _scale(rank, alpha, rslora)
    pairs, folded = attach.placed(adapter, model.config).pairs, model.folded_scales()
    found = {path: unscaled(*pair, folded.get(path, UNSCALED)) for path, pair in pairs.items()}
    return nested({path: {"lora_a": jnp.asarray(a) / scale, "lora_b": b} for path, (a, b) in found.items()})


def _scale(rank: int, alpha: float | None, rslora: bool) -> float:
    return (2.0 * rank if alpha is None else alpha) / (math.sqrt(rank) if rslora else rank)
