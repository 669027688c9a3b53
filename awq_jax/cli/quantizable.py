"""Whether the reference decoder has a checkpoint's architecture, and how it would be scaled: from its config alone."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from awq_jax import models, paths
from awq_jax.convert.formats import float_weights
from awq_jax.convert.formats.orbax_files import holds_params
from awq_jax.convert.source import Info, Source, read_config
from awq_jax.errors import AwqError
from awq_jax.models.weights import params
from awq_jax.plan.plan import ScaleGroup
from awq_jax.stream import decoder_blocks


class ConfigOnly:
    """A directory that holds a ``config.json`` and no weights, as a source without tensors."""

    format = "config.json alone"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_config(directory)

    def names(self) -> list[str]:
        """None."""
        return []

    def info(self, name: str) -> Info:
        """Never called: there are no names."""
        raise KeyError(name)


def config_only(path: Path) -> bool:
    """Whether that is a directory with a config and without weights of any kind (an index of them may be there)."""
    weights = ("*.safetensors", "*.gguf", *float_weights.PICKLES)
    return (path / "config.json").is_file() and not holds_params(path) and not any(any(path.glob(w)) for w in weights)


def architecture(source: Source | ConfigOnly) -> models.ModelConfig:
    """What its config says the model is.

    Raises:
      UnsupportedModelError, ConfigError: see `awq_jax.models.config_of`.
    """
    return models.config_from_hf(source.config) if isinstance(source, ConfigOnly) else models.config_of(source)


def support(source: Source | ConfigOnly) -> dict[str, Any]:
    """What a quantization would find.

    Layers that are alike are looked at once, so that the time does not grow with their number.

    Returns:
      ``supported``; ``reason`` why it is not, or None; ``parameters`` of the whole model, by its config; ``plan``:
      ``groups`` (what absorbs the scale of which linears), ``unscaled`` and ``float`` (and why), each once.
    """
    try:
        config = architecture(source)
        kinds = Counter(config.layers)
        different = dataclasses.replace(config, layers=tuple(kinds))
        plan = decoder_blocks.Chain(different).plan()
        leaves = paths.flatten(params.abstract(different)[1])
    except AwqError as e:
        return {"supported": False, "reason": str(e), "parameters": None, "plan": None}
    scaled, unscaled = rows(g for g in plan.groups if g.name.startswith("layers/"))
    skipped: dict[str, list[str]] = {}
    for path, why in plan.skipped.items():
        skipped.setdefault(why, []).append(short(path))
    left = [f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {why}" for why, names in skipped.items()]
    found = {"groups": scaled, "unscaled": unscaled, "float": left}
    alike = list(kinds.values())
    sizes = (
        math.prod(leaf.shape) * (alike[int(path.split("/")[1])] if path.startswith("layers/") else 1)
        for path, leaf in leaves.items()
    )
    return {"supported": True, "reason": None, "parameters": sum(sizes), "plan": found}


def rows(groups: Iterable[ScaleGroup]) -> tuple[list[str], list[str]]:
    """``"q k v <- input_layernorm"`` for what is scaled, ``"down: why not"`` for what is not; each once."""
    every = list(groups)
    absorbers = {g.name: g.absorbers for g in every}
    above = [absorbers.get(g.follows.group, ()) if g.follows else g.absorbers for g in every]
    scaled = (f"{_sites(g)} <- {_joined(a.path for a in of)}" for g, of in zip(every, above, strict=True) if of)
    rest = (f"{_sites(g)}: {_reason(g)}" for g, of in zip(every, above, strict=True) if not of)
    return list(dict.fromkeys(scaled)), list(dict.fromkeys(rest))


def short(path: str) -> str:
    """A parameter's path without its layer and what is the same in all names."""
    name = re.sub(r"^layers/\d+/|/(kernel|scale|bias)$|_proj\b", "", path)
    return re.sub(r"^(self_attn|mlp)/", "", name).replace("/", ".")


def _sites(group: ScaleGroup) -> str:
    return _joined(s.path for s in group.sites)


def _joined(names: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(map(short, names)))


def _reason(group: ScaleGroup) -> str:
    return re.sub(r" \(\w+\.py:\d+\)", "", group.reason)
