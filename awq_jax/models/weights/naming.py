"""Which of a family's names a checkpoint uses, and the tensors that no parameter is made of."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from awq_jax import paths
from awq_jax.convert.source import Source
from awq_jax.models.config import ModelConfig
from awq_jax.models.hf.registry import config_from_hf
from awq_jax.models.names import Names
from awq_jax.qtensor import QuantizedTensor


def config_of(source: Source) -> ModelConfig:
    """The architecture of a checkpoint, with the names that its tensors have.

    Raises:
      UnsupportedModelError, ConfigError: see `config_from_hf`.
    """
    from awq_jax.models.weights.params import abstract

    config = config_from_hf(source.config)
    if not config.other_names:
        return config
    there = set(source.names())
    all_paths = [p for p in paths.flatten(abstract(config)[1]) if "{e}" not in config.names.of(p)]

    def hits(names: Names) -> int:
        return sum(names.of(p) in there for p in all_paths)

    ways = (config.names, *config.other_names)
    best = max(ways, key=hits)
    return dataclasses.replace(config, names=best, other_names=tuple(w for w in ways if w is not best))


def carried(source: Source, config: ModelConfig) -> Iterator[tuple[str, np.ndarray | QuantizedTensor]]:
    """Tensors of a checkpoint that the decoder does not read and that are kept, one at a time, as stored."""
    for name in source.names():
        if config.names.carries(name):
            yield name, source.read(name)
