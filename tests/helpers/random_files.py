"""A family's checkpoint with random tensors, whose dtypes and further tensors are chosen."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_cases
import ml_dtypes
import multimodal
import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig

from awq_jax import models, paths
from awq_jax.models.weights import params as model_params

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@functools.cache
def _config(name: str) -> str:
    vision = {c.name: c for c in (*multimodal.CASES, *multimodal.CARRIED)}
    if name in vision:
        return json.dumps(multimodal.config_of(vision[name]))
    case = next(c for c in family_cases.CASES if c.name == name)
    hf = family_cases.config_of(case) | {"model_type": case.family}
    if case.family in CONFIG_MAPPING:
        hf = AutoConfig.for_model(case.family, **family_cases.config_of(case)).to_dict()
    return json.dumps(hf)


def config_of(name: str) -> dict[str, Any]:
    """Content of ``config.json`` of a case of `family_cases` or `multimodal`."""
    return json.loads(_config(name))


def write(
    directory: Path,
    hf: dict[str, Any],
    dtype: Callable[[str], str] = lambda path: "float32",
    extra: dict[str, np.ndarray] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Write ``config.json`` and one file of tensors.

    Args:
      directory: made.
      hf: content of ``config.json``.
      dtype: of each parameter, by its path in the decoder.
      extra: more tensors, by name.

    Returns:
      All tensors, by name.
    """
    config = models.config_from_hf(hf)
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in paths.flatten(model_params.abstract(config)[1]).items():
        how = model_params.stored(config.names, path, tuple(leaf.shape))
        middle = 1.0 if path.endswith("/scale") else 0.0
        for name in how.names:
            tensors[name] = np.asarray(middle + 0.1 * rng.normal(size=how.shape)).astype(DTYPES[dtype(path)])
    return save(directory, hf, tensors | (extra or {}))


def save(directory: Path, hf: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Write ``config.json`` and one file of ``tensors``, which are returned."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


def read(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Content of ``config.json``, and all tensors."""
    tensors: dict[str, np.ndarray] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return json.loads((directory / "config.json").read_text()), tensors
