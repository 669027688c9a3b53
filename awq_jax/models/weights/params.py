"""A checkpoint's tensors into the reference decoder's state, one at a time, and back."""

import dataclasses
import re
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from awq_jax import paths
from awq_jax.convert.arrays import codes
from awq_jax.convert.source import Info
from awq_jax.dtypes import FLOATS, all_finite
from awq_jax.errors import ShapeError, WeightError
from awq_jax.models.config import ModelConfig
from awq_jax.models.decoder import Decoder, Layer
from awq_jax.models.layers.moe import by_expert
from awq_jax.models.names import Names
from awq_jax.qtensor import QuantizedTensor, Weight

# Large numbers with small differences, which decide the choice of experts: as stored whatever dtype is asked for.
AS_STORED = ("/correction",)
EMBEDDING = "embed_tokens/embedding"


class Tensors(Protocol):
    """What is read from: part of `awq_jax.convert.source.Source`."""

    def names(self) -> list[str]: ...
    def info(self, name: str) -> Info: ...
    def read(self, name: str) -> np.ndarray | QuantizedTensor: ...


@dataclasses.dataclass(frozen=True)
class Part:
    """Columns of a tensor: part ``index`` of ``count``, interleaved or side by side."""

    index: int
    count: int
    interleaved: bool

    def of(self, whole: jax.Array) -> jax.Array:
        """This part of ``whole [..., N]``."""
        if self.interleaved:
            return whole[..., self.index :: self.count]
        return jnp.split(whole, self.count, axis=-1)[self.index]

    def join(self, parts: Sequence[jax.Array]) -> jax.Array:
        """The tensor that all ``parts`` together are."""
        if self.interleaved:
            return jnp.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)
        return jnp.concatenate(parts, axis=-1)


class Stored(NamedTuple):
    """How a checkpoint holds a parameter.

    Attributes:
      names: its tensors: one, or one for each expert.
      shape: of each as stored.
      transpose: the last two axes are the other way round there.
      stacked: our parameter has an axis for the experts in front.
      part: which of its columns are our parameter; None for all.
    """

    names: list[str]
    shape: tuple[int, ...]
    transpose: bool
    stacked: bool
    part: Part | None = None


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The decoder's static part, and its state with shapes in place of arrays.

    Of layers that are alike one is built, and copied.
    """
    kinds = tuple(dict.fromkeys(config.layers))
    decoder = nnx.eval_shape(lambda: Decoder(dataclasses.replace(config, layers=kinds), rngs=_one_key()))
    built = dict(zip(kinds, map(nnx.split, decoder.layers), strict=True))
    layers: list[Layer] = [
        nnx.merge(built[kind][0], jax.tree.map(lambda shape: shape, built[kind][1])) for kind in config.layers
    ]
    for layer in layers:
        layer.config = config
    decoder.config = config
    decoder.layers = nnx.List(layers)
    return nnx.split(decoder)


def _one_key() -> nnx.Rngs:
    """The same key for every parameter, where only shapes are asked for.

    `nnx.Rngs` counts its keys, and each count walks through all that has been traced so far: minutes for deep models.
    """
    key = jax.random.key(0)
    return cast(nnx.Rngs, types.SimpleNamespace(params=lambda: key))


def load(source: Tensors, config: ModelConfig, state: nnx.State, dtype: str | None = None) -> nnx.State:
    """Fill an `abstract` state from a checkpoint; never holds a second copy of more than one parameter.

    Args:
      source: tensors by Hugging Face name.
      config: the architecture: names, and tied heads.
      state: from `abstract`.
      dtype: float dtype of the result; None keeps each tensor's own. Packed weights then stand for floats of
        the embedding's, which is that of activations. What corrects the choice of experts always keeps its own.

    Returns:
      The state with arrays, packed weights as `QuantizedTensor`.

    Raises:
      WeightError: a tensor is missing, unexpected, not floating point, or holds NaN or inf.
      ShapeError: a tensor's shape is not what the config implies.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in paths.flatten(state).items()}
    weights = Weights(source, config, shapes, dtype)
    return paths.map_with_path(lambda path, _: weights.leaf(path), state)


class Weights:
    """The parameters of a checkpoint, each read when asked for.

    Args:
      source, config, dtype: as `load` takes them.
      shapes: of all parameters by path.

    Raises:
      WeightError: a tensor is missing or unexpected.
    """

    def __init__(
        self, source: Tensors, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], dtype: str | None = None
    ) -> None:
        there = set(source.names())
        self._source, self._dtype, self._base = source, dtype, dtype
        self._wanted = {path: _present(config.names, path, shape, there) for path, shape in shapes.items()}
        self._found = _match(source, self._wanted, config)

    def names(self, path: str) -> list[str]:
        """The tensors that make a parameter, as this checkpoint calls them."""
        return [self._found[name] for name in self._wanted[path].names]

    def stored(self, path: str) -> Stored:
        """How this checkpoint holds a parameter."""
        return self._wanted[path]

    def read(self, path: str) -> Iterator[np.ndarray | QuantizedTensor]:
        """The tensors that make a parameter, as stored."""
        return map(self._source.read, self.names(path))

    def base(self) -> str:
        """The dtype of activations: the embedding's, unless another was asked for."""
        if self._base is None:
            found = self._source.info(self.names(EMBEDDING)[0]).dtype
            self._base = found if found in FLOATS else "float32"
        return self._base

    def dtype_of(self, path: str) -> str:
        """The dtype that a parameter will have, from the headers of its tensors."""
        infos = [self._source.info(name) for name in self.names(path)]
        return jnp.result_type(*{self._kept(path, None if i.packed else i.dtype) for i in infos}).name

    def _kept(self, path: str, stored: str | None) -> str:
        """The dtype for a float tensor with the ``stored`` one, or for a packed one (None)."""
        if stored is None or stored not in FLOATS or (self._dtype is not None and not path.endswith(AS_STORED)):
            return self.base()
        return stored

    def leaf(self, path: str, values: Iterable[np.ndarray | QuantizedTensor] | None = None) -> Weight:
        """A parameter; see `load`. ``values``: what `read` gave, if it has been called."""
        how = self._wanted[path]
        parts = []
        for name, value in zip(self.names(path), self.read(path) if values is None else values, strict=True):
            kept = self._kept(path, None if isinstance(value, QuantizedTensor) else str(value.dtype))
            if isinstance(value, QuantizedTensor) and not path.endswith("/kernel"):
                value = codes.dequantize_transposed(value)  # an embedding: rows are looked up, not multiplied
            parts.append(_one(value, name, how, kept))
            del value
        return _stack(parts, path) if how.stacked else parts[0]


def tensors(state: Any, config: ModelConfig) -> Iterator[tuple[str, np.ndarray | QuantizedTensor]]:
    """The state as Hugging Face names and tensors, one at a time; packed ones in PyTorch's orientation."""
    flat = paths.flatten(state)
    packed = {_parent(path) for path, leaf in flat.items() if isinstance(leaf, QuantizedTensor)}
    incomplete: dict[str, dict[int, jax.Array]] = {}
    for path, leaf in flat.items():
        how = stored(config.names, path, tuple(leaf.shape), _parent(path) in packed)
        leaf = by_expert(leaf) if how.stacked else leaf
        for e, name in enumerate(how.names):
            one = jax.tree.map(lambda a, e=e: a[e], leaf) if how.stacked else leaf
            if isinstance(one, QuantizedTensor):
                axes = one.live_axes
                yield name, dataclasses.replace(one, axes="nk" if axes == "kn" else axes)
                continue
            if how.part is not None:
                parts = incomplete.setdefault(name, {})
                parts[how.part.index] = one
                if len(parts) < how.part.count:
                    continue
                one = how.part.join([parts[i] for i in range(how.part.count)])
                del incomplete[name]
            yield name, np.asarray(jnp.swapaxes(one, -1, -2) if how.transpose else one)


def _parent(path: str) -> str:
    """The module around a linear: experts that lie in one tensor have it in common."""
    return path.rsplit("/", 2)[0]


def stored(names: Names, path: str, shape: tuple[int, ...], packed: bool = False) -> Stored:
    """How a checkpoint holds the parameter at ``path`` of ``shape``; ``packed``: see `Names.of`."""
    name = names.of(path, packed)
    part = None
    if match := re.fullmatch(r"(.*)\[(\d+)(::|/)(\d+)\]", name):
        name, part = match[1], Part(int(match[2]), int(match[4]), match[3] == "::")
    transpose = names.transposed(path, name)
    stacked = "{e}" in name
    inner = shape[1:] if stacked else shape
    if part is not None:
        inner = (*inner[:-1], inner[-1] * part.count)
    if transpose:
        inner = (*inner[:-2], inner[-1], inner[-2])
    return Stored([name.format(e=e) for e in range(shape[0])] if stacked else [name], inner, transpose, stacked, part)


def _present(names: Names, path: str, shape: tuple[int, ...], there: Collection[str]) -> Stored:
    """How a checkpoint with the tensors ``there`` holds a parameter."""
    if names.packed:
        packed = stored(names, path, shape, packed=True)
        if any(n in there for n in names.spellings(packed.names[0])):
            return packed
    return stored(names, path, shape)


def _match(source: Tensors, wanted: dict[str, Stored], config: ModelConfig) -> dict[str, str]:
    """Tensor name -> the name it has in this checkpoint; complains about whatever does not pair up."""
    there = set(source.names())
    found: dict[str, str] = {}
    missing = []
    for name in (n for how in wanted.values() for n in how.names):
        spelled = next((n for n in config.names.spellings(name) if n in there), None)
        if spelled is None:
            missing.append(name)
        else:
            found[name] = spelled
    heads = config.names.spellings(config.names.of("lm_head/kernel")) if config.tied else []
    embedding, alone = config.names.of(EMBEDDING), next((n for n in heads if n in there), None)
    if embedding in missing and alone is not None:  # of the two, the one that is there is both
        missing.remove(embedding)
        found[embedding] = alone
    known = {*found.values(), *heads}
    rest = (n for n in sorted(there) if n not in known)
    unexpected = [n for n in rest if not config.names.makes_none(n, source.info(n).shape)]
    if unexpected:
        raise WeightError(
            f"the checkpoint holds {_some(unexpected)}, which a {config.family} model with this config.json does not "
            "have; check model_type, the biases and num_hidden_layers"
        )
    if missing:
        raise WeightError(f"the checkpoint lacks {_some(missing)}; is it complete?")
    return found


def _some(items: list[str]) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more


def _one(value: np.ndarray | QuantizedTensor, name: str, how: Stored, dtype: str) -> Weight:
    """A tensor as read, checked, in our orientation."""
    if isinstance(value, QuantizedTensor):
        return _packed(value, name, how, dtype)
    check_shape(name, tuple(value.shape), how.shape)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise WeightError(f"{name} is {value.dtype}, not floating point; was it quantized by an unknown tool?")
    with np.errstate(over="ignore"):
        value = value.astype(FLOATS[dtype], copy=False)
    if not all_finite(value):
        raise WeightError(f"{name} holds NaN or inf as {dtype}; re-download it, or load with dtype='float32'")
    array = _held(value)
    array = jnp.swapaxes(array, -1, -2) if how.transpose else array
    return array if how.part is None else how.part.of(array)


def _packed(value: QuantizedTensor, name: str, how: Stored, dtype: str) -> QuantizedTensor:
    # One matrix is canonical inside whatever its orientation, and PyTorch's in every file.
    linear = len(how.shape) == 2 and not value.batch
    want = how.shape if how.transpose or not linear else how.shape[::-1]
    check_shape(name, value.shape, want)
    if not all_finite(np.asarray(value.scales)):
        raise WeightError(f"the scales of {name} hold NaN or inf; re-download the checkpoint")
    value = jax.tree.map(_held, value)
    return dataclasses.replace(value, axes="kn" if linear else value.axes, dtype=dtype)


def _held(array: np.ndarray) -> jax.Array:
    """What was read, on the device. Nobody writes into it any more, so on a CPU it is used where it lies."""
    return jax.device_put(array, may_alias=True)


def check_shape(name: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape.

    Raises:
      ShapeError: naming it.
    """
    if got != want:
        raise ShapeError(f"{name} has shape {got}; config.json implies {want}")


def _stack(parts: Sequence[Weight], path: str) -> Weight:
    """The experts' matrices as one parameter; all float unless all are packed alike."""
    packed = [isinstance(p, QuantizedTensor) for p in parts]
    if all(packed) and len({jax.tree.structure(p) for p in parts}) == 1:
        join: Callable[..., Any] = lambda *a: jnp.stack(a)  # noqa: E731
        out = jax.tree.map(join, *parts)
        return dataclasses.replace(out, axes="b" + out.axes)
    return jnp.stack([p.dequantize() if isinstance(p, QuantizedTensor) else p for p in parts])
