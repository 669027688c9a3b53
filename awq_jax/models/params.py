"""A checkpoint's tensors into the reference decoder's state, one at a time, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from awq_jax import paths
from awq_jax.convert import names
from awq_jax.errors import ShapeError, WeightError
from awq_jax.models.config import ModelConfig
from awq_jax.models.decoder import Decoder
from awq_jax.qtensor import QuantizedTensor


class Tensors(Protocol):
    """What is read from: part of `awq_jax.convert.source.Source`."""

    def names(self) -> list[str]: ...
    def read(self, name: str) -> np.ndarray | QuantizedTensor: ...


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The decoder's static part, and its state with shapes in place of arrays."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))


def load(source: Tensors, config: ModelConfig, state: nnx.State, dtype: str | None = None) -> nnx.State:
    """Fill an `abstract` state from a checkpoint; never holds a second copy of more than one tensor.

    Args:
      source: tensors by Hugging Face name.
      config: the architecture, for messages and tied heads.
      state: from `abstract`.
      dtype: float dtype of the result; None takes the embedding's as stored.

    Returns:
      The state with arrays, packed weights as `QuantizedTensor`.

    Raises:
      WeightError: a tensor is missing, unexpected, not floating point, or holds NaN or inf.
      ShapeError: a tensor's shape is not what the config implies.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in paths.flatten(state).items()}
    found = _match(source.names(), shapes, config)
    leaves: dict[str, jax.Array | QuantizedTensor] = {}
    order = sorted(found, key=lambda p: p != "embed_tokens/embedding")  # first, as it decides the dtype
    for path in order:
        name, transpose = found[path]
        value = source.read(name)
        if dtype is None:
            dtype = str(value.dtype)
        if isinstance(value, QuantizedTensor):
            leaves[path] = _packed(value, name, shapes[path], transpose, dtype)
        else:
            leaves[path] = _dense(value, name, shapes[path], transpose, dtype)
        del value
    return paths.map_with_path(lambda path, _: leaves[path], state)


def tensors(state: nnx.State) -> Iterator[tuple[str, np.ndarray | QuantizedTensor]]:
    """The state as Hugging Face names and tensors, in PyTorch's orientation, one at a time.

    Raises:
      WeightError: for a parameter that has no Hugging Face name.
    """
    for path, leaf in paths.flatten(state).items():
        target = names.to_name(path)
        if target is None:
            raise WeightError(f"parameter {path!r} has no Hugging Face name")
        name, transpose = target
        if isinstance(leaf, QuantizedTensor):
            yield name, dataclasses.replace(leaf, axes=leaf.axes[::-1] if transpose else leaf.axes)
        else:
            yield name, np.asarray(leaf.T if transpose else leaf)


def _match(available: list[str], shapes: dict[str, Any], config: ModelConfig) -> dict[str, tuple[str, bool]]:
    """``path -> (name, transpose)``; complains about whatever does not pair up."""
    found: dict[str, tuple[str, bool]] = {}
    unexpected = []
    for name in available:
        target = names.to_path(name)
        if target and target[0] in shapes:
            found[target[0]] = (name, target[1])
        elif not names.IGNORED.search(name) and not (config.tied and name == "lm_head.weight"):
            unexpected.append(name)
    if unexpected:
        raise WeightError(
            f"the checkpoint holds {_some(unexpected)}, which a {config.family} model with this config.json does not "
            "have; check model_type, the biases and num_hidden_layers"
        )
    missing = [target[0] for path in shapes if path not in found and (target := names.to_name(path))]
    if missing:
        raise WeightError(f"the checkpoint lacks {_some(missing)}; is it complete?")
    return found


def _some(items: list[str]) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more


def _check_shape(name: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
    if got != want:
        raise ShapeError(f"{name} has shape {got}; config.json implies {want}")


def _dense(value: np.ndarray, name: str, shape: tuple[int, ...], transpose: bool, dtype: str) -> jax.Array:
    _check_shape(name, tuple(value.shape), shape[::-1] if transpose else shape)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise WeightError(f"{name} is {value.dtype}, not floating point; was it quantized by an unknown tool?")
    array = jnp.asarray(value).astype(dtype)
    if not bool(jnp.isfinite(array).all()):
        raise WeightError(f"{name} holds NaN or inf as {dtype}; re-download it, or load with dtype='float32'")
    return array.T if transpose else array


def _packed(value: QuantizedTensor, name: str, shape: tuple[int, ...], transpose: bool, dtype: str) -> QuantizedTensor:
    _check_shape(name, value.shape, shape[::-1] if transpose else shape)
    if not bool(jnp.isfinite(value.scales).all()):
        raise WeightError(f"the scales of {name} hold NaN or inf; re-download the checkpoint")
    value = jax.tree.map(jnp.asarray, value)
    return dataclasses.replace(value, axes=value.axes[::-1] if transpose else value.axes, dtype=dtype)
