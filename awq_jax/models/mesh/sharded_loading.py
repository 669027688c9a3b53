"""A checkpoint straight onto a mesh: each device's part of each tensor is read, put there and forgotten."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from awq_jax import paths
from awq_jax.convert.arrays import codes
from awq_jax.convert.files import slices
from awq_jax.convert.source import SliceReader, Source
from awq_jax.dtypes import FLOATS
from awq_jax.errors import WeightError
from awq_jax.kernels import parallel
from awq_jax.models.config import ModelConfig
from awq_jax.models.layers import moe
from awq_jax.models.mesh import sharding
from awq_jax.models.weights import params as model_params
from awq_jax.placement import Placement, float_spec
from awq_jax.qtensor import QuantizedTensor, Weight

log = logging.getLogger(__name__)


def load(source: Source, config: ModelConfig, state: nnx.State, base: Placement, dtype: str | None = None) -> nnx.State:
    """As `awq_jax.models.weights.params.load`, onto the devices of ``base`` that belong to this process.

    The host holds one part of one parameter at a time; of a tensor whose format cannot be read in parts,
    also all of that tensor (see `awq_jax.convert.files.slices`).

    Raises:
      WeightError, ShapeError: as there.
      CheckpointError: a tensor cannot be read.
    """
    loader = Loader(source, config, state, base, dtype)
    log.info("%s", sharding.explain(loader.leaves, loader.cuts, base.size))
    return paths.map_with_path(lambda path, _: loader.leaf(path), state)


class Loader:
    """Reads the parameters of a checkpoint, each to where the rule has it; see `load`."""

    def __init__(self, source: Source, config: ModelConfig, state: nnx.State, base: Placement, dtype: str | None):
        shapes = {path: tuple(leaf.shape) for path, leaf in paths.flatten(state).items()}
        self.base, self.shapes = base, shapes
        self.weights = model_params.Weights(source, config, shapes, dtype)
        self.source, self.reader = source, SliceReader(source)
        self.leaves = leaves_of(source, self.weights, shapes)
        self.cuts = sharding.rule(config, self.leaves, base.size)

    def leaf(self, path: str) -> Weight:
        """A parameter on the mesh."""
        place = self.cuts[path].place(self.base)
        if len(self.shapes[path]) < 2 or not path.endswith(("/kernel", "/embedding")):
            value = np.asarray(self.weights.leaf(path))
            return jax.make_array_from_callback(value.shape, place.sharding(PartitionSpec()), lambda i: value[i])
        shape = self.shapes[path]
        spec = place.sharding(float_spec(place.dim, len(shape), place.axis))
        parts: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
        for device, index in spec.addressable_devices_indices_map(shape).items():
            assert index is not None
            parts.setdefault(tuple(map(slices.bounds, index, shape)), []).append(device)
        placed: list[Weight] = []
        for bounds, devices in parts.items():
            part = self._part(path, bounds)
            placed += [jax.tree.map(lambda a, d=d: jax.device_put(a, d), part) for d in devices]
            del part
        self.reader.forget()
        return _assembled(placed, place, spec, shape)

    def _part(self, path: str, bounds: tuple[tuple[int, int], ...]) -> np.ndarray | QuantizedTensor:
        """A block of a parameter, in our orientation, in host memory."""
        how = self.weights.stored(path)
        names = self.weights.names(path)
        if not how.stacked:
            return self._block(path, names[0], bounds)
        blocks = [self._block(path, name, bounds[1:]) for name in names[slice(*bounds[0])]]
        packed = [b for b in blocks if isinstance(b, QuantizedTensor)]
        if not packed:
            return np.stack(cast(list[np.ndarray], blocks))
        stacked = jax.tree.map(lambda *a: np.stack(a), *_alike(packed))
        return dataclasses.replace(stacked, axes="b" + stacked.axes)

    def _block(self, path: str, name: str, bounds: tuple[tuple[int, int], ...]) -> np.ndarray | QuantizedTensor:
        """The same of one tensor."""
        how, info = self.weights.stored(path), self.source.info(name)
        matrix = info.packed is not None and path.endswith("/kernel") and len(how.shape) == 2
        turned = how.transpose or matrix  # packed ones are [N, K] in every file
        model_params.check_shape(name, info.shape, how.shape[::-1] if matrix and not how.transpose else how.shape)
        index, part = [slice(*b) for b in bounds], how.part
        if part is not None:  # of columns that another parameter shares
            ahead = part.index * self.shapes[path][-1]
            whole = self.shapes[path][-1] * part.count
            index[-1] = slice(0, whole) if part.interleaved else slice(index[-1].start + ahead, index[-1].stop + ahead)
        if info.packed is not None and len(how.shape) == 3:
            value = self.reader.read(name, [slice(0, n) for n in info.shape])
            value = slices.cut(moe.by_expert(value), tuple(index))
        else:
            if turned:
                index[-2:] = index[:-3:-1]
            value = self.reader.read(name, index)
        if self.leaves[path].group is not None:
            assert isinstance(value, QuantizedTensor)
            return _packed(value, name, self.weights.base())
        if isinstance(value, QuantizedTensor):
            value = codes.dequantize(value).T
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise WeightError(f"{name} is {value.dtype}, not floating point; was it quantized by an unknown tool?")
        dtype = self.weights.dtype_of(path)
        value = value.astype(dtype)
        if not np.isfinite(value).all():
            raise WeightError(f"{name} holds NaN or inf as {dtype}; re-download it, or load with dtype='float32'")
        if turned:
            value = np.swapaxes(value, -1, -2)
        if part is not None and part.interleaved:
            value = value[..., part.index :: part.count][..., slice(*bounds[-1])]
        return np.ascontiguousarray(value)


def _packed(value: QuantizedTensor, name: str, dtype: str) -> QuantizedTensor:
    if not np.isfinite(value.scales).all():
        raise WeightError(f"the scales of {name} hold NaN or inf; re-download the checkpoint")
    value = dataclasses.replace(value, axes=value.axes if value.batch else "kn", dtype=dtype)
    return jax.tree.map(np.ascontiguousarray, value)


def _alike(parts: list[QuantizedTensor]) -> list[QuantizedTensor]:
    """Experts of one structure: all with zero points if any has them."""
    if all(p.symmetric for p in parts):
        return parts
    middle = [np.full(p.scales.shape, 2 ** (p.bits - 1), np.uint8) if p.symmetric else p.zeros for p in parts]
    return [dataclasses.replace(p, zeros=z) for p, z in zip(parts, middle, strict=True)]


def _assembled(placed: list[Weight], place: Placement, spec: NamedSharding, shape: tuple[int, ...]) -> Weight:
    """The parameter whose parts lie on the devices of this process."""
    first = placed[0]
    if not isinstance(first, QuantizedTensor):
        return jax.make_array_from_single_device_arrays(shape, spec, cast(list[jax.Array], placed))
    tables: dict[str, Any] = {}
    for field, where in vars(parallel.shardings(first, place)).items():
        if isinstance(where, NamedSharding):
            parts = [getattr(p, field) for p in placed]
            sizes = [n * (place.size if axis else 1) for n, axis in zip(parts[0].shape, where.spec, strict=True)]
            tables[field] = jax.make_array_from_single_device_arrays(tuple(sizes), where, parts)
    return dataclasses.replace(first, **tables, k_dims=shape[-2:-1], n_dims=shape[-1:], placement=place)


def leaves_of(
    source: Source, weights: model_params.Weights, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, sharding.Leaf]:
    """What the headers of a checkpoint say of the parameters."""

    def leaf(path: str, shape: tuple[int, ...]) -> sharding.Leaf:
        packed = [source.info(name).packed for name in weights.names(path)]
        first, count = packed[0], math.prod(shape)
        if first is None or not path.endswith("/kernel") or any(p != first for p in packed):
            return sharding.Leaf(shape, count * FLOATS[weights.dtype_of(path)].itemsize)
        per_group = np.dtype(first.scale_dtype).itemsize * (2 if first.offsets else 1) + (not first.symmetric)
        nbytes = count * first.bits // 8 + count // first.group_size * per_group
        return sharding.Leaf(shape, nbytes, sharding.unit(first.group_size, first.bits), first.act_order)

    return {path: leaf(path, shape) for path, shape in shapes.items()}
