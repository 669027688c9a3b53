"""The engine's linears with packed weights: made, loaded, laid over its mesh, multiplied.

Imports the engine, and is imported by `awq_jax.vllm.plugin` alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from tpu_inference.layers.common.utils import cpu_mesh
from tpu_inference.layers.jax.linear import JaxEinsum, JaxMergedColumnParallelLinear
from tpu_inference.layers.jax.moe.moe import JaxMoE, JaxRoutedExperts
from tpu_inference.layers.jax.quantization import QuantizeMethodBase
from tpu_inference.layers.jax.quantization.configs import QuantizationConfig, QuantLinearConfig
from tpu_inference.layers.jax.quantization.unquantized import UnquantizedConfig

from awq_jax import kernels
from awq_jax.errors import BackendError, CheckpointError, ShapeError
from awq_jax.kernels import parallel
from awq_jax.placement import Placement
from awq_jax.qtensor import QuantizedTensor
from awq_jax.vllm.settings import Arrays, Scheme, Settings

ON_DEVICE = ("qweight", "scales", "zeros")


class PackedConfig(QuantizationConfig):
    """The engine's quantization config of a packed checkpoint."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.floats = UnquantizedConfig({})

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """What makes, loads and applies the weights of a layer.

        Raises:
          BackendError: packed experts.
          FormatError: linears that are joined and packed differently.
        """
        if isinstance(layer, JaxRoutedExperts | JaxMoE):
            if self.settings.of_layer(f"{prefix}.0.gate_proj") is not None:
                raise BackendError(
                    f"{prefix}: packed experts are not served by the JAX models of tpu-inference; serve the checkpoint "
                    "with vLLM on a GPU, or the float one: awq-jax convert --to float"
                )
            return self.floats.get_quant_method(layer, prefix)
        if not isinstance(layer, JaxEinsum):
            return None
        scheme = self.settings.of_layer(prefix)
        if scheme is None:
            return self.floats.get_quant_method(layer, prefix)
        return PackedLinearMethod(layer, scheme, self.settings)


class PackedLinearMethod(QuantizeMethodBase):
    """A packed weight in place of an einsum's kernel; of a joined layer, several of the checkpoint's side by side."""

    def __init__(self, layer: JaxEinsum, scheme: Scheme, settings: Settings) -> None:
        self.scheme, self.settings, self.prefix = scheme, settings, layer.prefix
        merged = isinstance(layer, JaxMergedColumnParallelLinear)
        config = QuantLinearConfig(layer, enable_sp=False)
        if config.batch_features:
            raise BackendError(f"{self.prefix}: {layer.einsum_str!r} has a batch axis; packed weights take none")
        self.in_features = math.prod(config.in_features)
        self.output_shape = tuple(config.out_features)
        self.sizes = tuple(layer.output_sizes) if merged else (math.prod(self.output_shape),)
        self.cut = (config.in_features_sharding[0], config.out_features_sharding[0])
        self.taken: dict[tuple[str, int], np.ndarray] = {}  # by the tensor's name, and which of the joined linears
        self.weight: QuantizedTensor | None = None  # what it is but for its arrays, once it is loaded

    def create_weights_jax(self, layer: JaxEinsum, *weight_args: Any, rngs: Any = None, **extra: Any) -> None:
        """Parameters that only say which tensors of the checkpoint belong to the layer."""
        delattr(layer, "weight")
        for part in self.scheme.parts:
            param = nnx.Param(jnp.zeros((1,), jnp.int32), eager_sharding=False)
            param.set_metadata("weight_loader", functools.partial(self._take, part))
            param.set_metadata("out_sharding", ())
            param.set_metadata("mesh", cpu_mesh())
            setattr(layer, part, param)
        if layer.bias is not None and len(self.sizes) > 1:
            layer.bias.set_metadata("weight_loader", functools.partial(self._take, "bias"))

    def _take(self, part: str, param: nnx.Param, tensor: Any, shard_id: int = -1) -> None:
        """Keep a tensor of the checkpoint, as it is, until all are there."""
        self.taken[part, max(shard_id, 0)] = _numpy(tensor)
        param.set_metadata("_is_loaded", True)

    def process_weights_after_loading(self, layer: JaxEinsum, *args: Any, **kwargs: Any) -> bool:
        """Once all tensors are there: the packed weight, laid over the engine's mesh.

        Returns:
          Whether they were.

        Raises:
          CheckpointError: tensors whose shapes are not those of the layer.
          ShapeError: a layer that does not divide by its groups and the devices.
        """
        if self.weight is not None:
            return True
        parts = (*self.scheme.parts, *(("bias",) if layer.bias is not None and len(self.sizes) > 1 else ()))
        if any((part, i) not in self.taken for part in parts for i in range(len(self.sizes))):
            return False
        place = self._placement()
        pieces = [self._decode(i) for i in range(len(self.sizes))]
        devices = place.size if place is not None and place.dim == "n" else 1
        joined = {
            name: _interleaved([getattr(p, name) for p in pieces], devices)
            for name in ON_DEVICE
            if getattr(pieces[0], name) is not None
        }
        if "zeros" in joined and _devices()[0].platform == "tpu":
            # As the kernel reads them: else every step would make a copy.
            joined["zeros"] = joined["zeros"].astype(ml_dtypes.bfloat16)
        k = self.in_features
        q: Any = QuantizedTensor(
            joined["qweight"], joined["scales"], joined.get("zeros"), None,
            bits=self.scheme.bits, group_size=k // joined["scales"].shape[0], axes="kn", k_dims=(k,),
            n_dims=(sum(self.sizes),), dtype="float32", placement=place,
        )  # fmt: skip
        self._check_division(q)
        for part in self.scheme.parts:
            delattr(layer, part)
        where = None if place is None else parallel.shardings(q, place)
        for name, array in joined.items():
            put = jax.device_put(array, _devices()[0] if where is None else getattr(where, name))
            setattr(layer, f"packed_{name}", nnx.Param(put))
        if "bias" in parts:
            bias = _interleaved([self.taken["bias", i] for i in range(len(self.sizes))], devices)
            layer.bias = nnx.Param(jnp.asarray(bias, layer.bias.value.dtype))
        self.taken.clear()
        self.weight = dataclasses.replace(q, **dict.fromkeys(ON_DEVICE))
        return True

    def _decode(self, i: int) -> Arrays:
        tensors = {part: self.taken[part, i] for part in self.scheme.parts}
        n, k = self.sizes[i], self.in_features
        groups = k // self.scheme.group_size if self.scheme.group_size else 1
        shapes = {name: t.shape for name, t in tensors.items()}
        try:
            found = self.settings.decode(self.scheme, tensors, n, k)
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{self.prefix} has {shapes}, which are no packed linear") from error
        words = -(-k * self.scheme.bits // 32)
        fits = found.qweight.shape == (words, n) and found.scales.shape == (groups, n)
        if not fits or (found.zeros is not None and found.zeros.shape != (groups, n)):
            raise CheckpointError(
                f"{self.prefix} has {shapes}, and the engine's layer {k} inputs and {n} outputs in {groups} groups. "
                "It pads heads to 64 or a multiple of 128, and their number to that of the devices: packed weights are "
                "not padded"
            )
        return found

    def _placement(self) -> Placement | None:
        """How the weight lies on the engine's mesh."""
        mesh = jax.sharding.get_mesh()
        if mesh.empty or mesh.size == 1:
            return None
        for dim, axes in zip(("k", "n"), self.cut, strict=True):
            named = (axes,) if isinstance(axes, str) else tuple(axes or ())
            used = [a for a in named if mesh.shape.get(a, 1) > 1]
            if len(used) > 1:
                raise ShapeError(f"{self.prefix} is cut along {used} of the mesh; packed weights take one axis")
            if used:
                return Placement(mesh, used[0], dim)  # type: ignore[arg-type]
        return Placement(mesh, mesh.axis_names[0], "")

    def _check_division(self, q: QuantizedTensor) -> None:
        place = q.placement
        if place is None or not place.dim:
            return
        if place.dim == "k" and (q.k // q.group_size % place.size or q.k // place.size % q.group_size):
            raise ShapeError(
                f"{self.prefix}: {q.k} inputs in groups of {q.group_size} do not divide by {place.size} devices; "
                "quantize with a smaller --group-size, or serve on fewer"
            )
        if place.dim == "n" and any(size % place.size for size in self.sizes):
            raise ShapeError(f"{self.prefix}: {self.sizes} outputs do not divide by {place.size} devices")

    def apply_jax(self, layer: Any, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """``x [T, ...]``, flattened to ``[T, K]``, times the weight: ``[T, ...]`` of the einsum's output axes."""
        assert self.weight is not None, f"{self.prefix} was not loaded"
        arrays = {name: p[...] for name in ON_DEVICE if (p := getattr(layer, f"packed_{name}", None)) is not None}
        q = dataclasses.replace(self.weight, **arrays)
        y = kernels.matmul(x.reshape(-1, self.in_features), q)
        if layer.bias is not None:
            y = y + layer.bias[...].reshape(-1).astype(y.dtype)
        place = q.placement
        if len(self.sizes) > 1 and place is not None and place.dim == "n":
            y = _separated(y, self.sizes, place.size)
        return y.reshape(*y.shape[:-1], *self.output_shape)


def _devices() -> list[jax.Device]:
    """Of the engine's mesh."""
    mesh = jax.sharding.get_mesh()
    return jax.devices() if mesh.empty else list(mesh.devices.flat)


def _numpy(tensor: Any) -> np.ndarray:
    """A torch tensor's values; of bfloat16, which NumPy lacks, by its bits."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _interleaved(pieces: list[np.ndarray], devices: int) -> np.ndarray:
    """Joined along the last axis so that each device's part holds its share of every piece."""
    return np.concatenate([part for d in range(devices) for part in (np.split(p, devices, -1)[d] for p in pieces)], -1)


def _separated(y: jax.Array, sizes: tuple[int, ...], devices: int) -> jax.Array:
    """Undoes `_interleaved` on results ``[T, N]``; each device's columns stay there."""
    parts = y.reshape(*y.shape[:-1], devices, -1)
    starts = np.cumsum([size // devices for size in sizes])[:-1].tolist()
    return jnp.concatenate([p.reshape(*y.shape[:-1], -1) for p in jnp.split(parts, starts, axis=-1)], axis=-1)
