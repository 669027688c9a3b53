"""The base an adapter is for: float, or with scales folded into it, which the adapter is rescaled by.

A linear of a base with folded scales reads x / s and makes y / t. What an adapter adds to y, ``(x A^T) B^T``, it adds
there with ``A' = A diag(s)`` and ``B' = diag(1 / t) B``: exact, as the adapter stays float.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np

from awq_jax.adapters.files import Adapter, Factors
from awq_jax.convert import folded_scales, registry
from awq_jax.convert.folded_scales import FoldedScales
from awq_jax.convert.source import Source, path_of
from awq_jax.errors import CheckpointError, ConfigError, Setting, ShapeError
from awq_jax.report import FoldedScale

log = logging.getLogger(__name__)

TERMS = ("auto", "float", "base")  # whose inputs the factors were trained on
# Formats whose makers fold scales into the weights and keep none.
FOLDING = ("gemm", "gemv", "gemv_fast", "gemv-fast", "marlin", "llm-awq")


@dataclasses.dataclass(frozen=True)
class Base:
    """What an adapter has to know of a checkpoint.

    Attributes:
      name: directory, file or hub id.
      format: of `awq_jax.convert.registry.FORMATS`, or ``"gguf"``.
      scales: folded into it; {} for none; None: an AWQ checkpoint that does not say.
    """

    name: str
    format: str
    scales: FoldedScales | None

    @property
    def digest(self) -> str:
        """Of the scales; "" for none."""
        return folded_scales.digest(self.scales) if self.scales else ""


def of(source: Source | str | Path) -> Base:
    """What an adapter has to know of a checkpoint.

    Raises:
      CheckpointError: it cannot be read.
    """
    opened = registry.open_source(source, packed=True) if isinstance(source, str | Path) else source
    scales = folded_scales.of(opened)
    name = str(source if isinstance(source, str | Path) else path_of(opened) or "the base")
    unknown = scales is None and opened.format in FOLDING
    return Base(name, opened.format, None if unknown else scales or {})


def fitted(adapter: Adapter, base: Base, terms: str = "auto") -> Adapter:
    """The adapter in the base's terms: as it is, or rescaled; and saying so.

    Args:
      terms: whose inputs its factors were trained on: ``"float"``, those of the float model; ``"base"``, the base's;
        ``"auto"``: what the adapter's config says. One that says nothing was trained on the base if it names that as
        its base, and else on the float model.

    Raises:
      ConfigError: on other ``terms``.
      CheckpointError: it was trained on a checkpoint with other folded scales, or the base's are not known.
      ShapeError: a factor does not fit the scale of its module.
    """
    if terms not in TERMS:
        raise ConfigError(f"terms must be one of {', '.join(TERMS)}; got {terms!r}")
    if terms == "base":
        return adapter.told(base.name, base.digest)
    said = adapter.scales
    if terms == "float":
        said = ""
    elif said is None:
        named = adapter.config.get("base_model_name_or_path")
        if isinstance(named, str) and _same(named, base.name):
            return adapter.told(base.name, base.digest)
        said = ""
    if base.scales is None:
        if said:
            raise CheckpointError(f"{adapter.name} was trained on a checkpoint whose folded scales {base.name} lacks")
        given = Setting("terms", "base")
        raise CheckpointError(
            f"{base.name} is an AWQ checkpoint of another maker: scales are folded into its weights, and it does not "
            f"say which. If {adapter.name} was trained on the float model, give awq-jax adapter rescale --float its "
            f"directory, and the scales are found; if on this checkpoint, pass {given}",
            given,
        )
    if said == base.digest:
        return adapter.told(base.name, base.digest)
    if said:
        raise CheckpointError(
            f"{adapter.name} was trained on a checkpoint with other folded scales ({said}) than {base.name} has "
            f"({base.digest or 'none'}): train it on this base or on the float model, or serve it on its own base"
        )
    log.info("%s: rescaled by the scales folded into %s", adapter.name, base.name)
    return rescaled(adapter, base.scales).told(base.name, base.digest)


def rescaled(adapter: Adapter, scales: FoldedScales) -> Adapter:
    """An adapter of the float model in the terms of a base with these scales.

    Raises:
      ShapeError: a factor does not fit the scale of its module.
      CheckpointError: it replaces a norm's weight, which scales are folded into.
    """
    for name in adapter.whole:
        if "norm" in name and scales:
            raise CheckpointError(
                f"{adapter.name} replaces {name} (modules_to_save), into which scales are folded; train without it"
            )
    aliases = {_short(module): scale for module, scale in scales.items()}
    factors = {}
    for module, f in adapter.factors.items():
        scale = scales.get(module, aliases.get(_short(module), FoldedScale(None, None)))
        factors[module] = _rescaled(module, f, scale)
    return dataclasses.replace(adapter, factors=factors)


def _rescaled(module: str, f: Factors, scale: FoldedScale) -> Factors:
    for s, channels, what in ((scale.input, f.a.shape[1], "inputs"), (scale.output, len(f.b), "outputs")):
        if s is not None and s.shape != (channels,):
            raise ShapeError(f"{module} has {channels} {what} in the adapter, and {s.shape} scales in the base")
    a, b = (np.asarray(x, np.float32) for x in (f.a, f.b))
    a = a if scale.input is None else a * scale.input
    b = b if scale.output is None else b / scale.output[:, None]
    return Factors(a, b, f.scale)


def _short(module: str) -> str:
    """A module's name from its layer on: checkpoints of one model differ in what stands before."""
    _, dot, inside = module.partition("layers.")
    return dot + inside if dot else module.rpartition(".")[2]


def _same(a: str, b: str) -> bool:
    """Whether two names are of one checkpoint."""
    if a == b:
        return True
    left, right = (Path(x).expanduser() for x in (a, b))
    return left.exists() and right.exists() and left.resolve() == right.resolve()
