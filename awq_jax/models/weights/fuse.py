"""Linears that read the same activation as one: queries, keys and values; gate and up.

A decode step is bound by how many kernels start and how long each reads; one matrix instead of three reads
the same bytes in one go. Columns do not know of each other, so results are the same; and the parts can be
had back to the bit. The families that come with fused matrices already have the code paths.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from awq_jax import paths
from awq_jax.kernels import parallel
from awq_jax.models.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, MoEConfig
from awq_jax.models.layers import fused_columns
from awq_jax.models.weights import params as model_params
from awq_jax.qtensor import QuantizedTensor, Weight

COLUMNS = ("qweight", "scales", "zeros", "offsets")  # the tables of a packed weight that have its columns


@dataclasses.dataclass(frozen=True)
class FusedLinears:
    """Linears that read the same activation.

    Attributes:
      layer: number of their layer.
      module: path of the module around them.
      parts: their names.
      whole: what a fused model calls them together.
    """

    layer: int
    module: str
    parts: tuple[str, ...]
    whole: str

    def fused(self, layer: LayerConfig, ways: int = 1) -> LayerConfig:
        """The layer's config with them fused."""
        if isinstance(layer.attention, AttentionConfig) and self.whole == "qkv_proj":
            whole = dataclasses.replace(layer.attention, fused="concatenated", ways=ways)
            return dataclasses.replace(layer, attention=whole)
        if isinstance(layer.mlp, MLPConfig):
            return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, fused=True, ways=ways))
        assert isinstance(layer.mlp, MoEConfig)
        field = "shared" if self.module.endswith("shared_expert") else "expert"
        inner: Any = dataclasses.replace(getattr(layer.mlp, field), fused=True, ways=ways)
        return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, **{field: inner}))


def fusable(config: ModelConfig) -> Iterator[FusedLinears]:
    """All linears of the model that can be fused and are not."""
    for i, layer in enumerate(config.layers):
        place, c = f"layers/{i}", layer.attention
        if isinstance(c, AttentionConfig) and c.fused is None and not c.gated:
            yield FusedLinears(i, f"{place}/self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj")
        mlps: dict[str, MLPConfig | None] = {"mlp": layer.mlp} if isinstance(layer.mlp, MLPConfig) else {}
        if isinstance(layer.mlp, MoEConfig):
            mlps = {"mlp/experts": layer.mlp.expert, "mlp/shared_expert": layer.mlp.shared}
        for name, mlp in mlps.items():
            if mlp is not None and mlp.gated and not mlp.fused:
                yield FusedLinears(i, f"{place}/{name}", ("gate_proj", "up_proj"), "gate_up_proj")


def apart(config: ModelConfig) -> ModelConfig:
    """The config of the same model without fused linears, but for those grouped by head."""

    def mlp(c: MLPConfig) -> MLPConfig:
        return dataclasses.replace(c, fused=False, ways=1)

    def layer(c: LayerConfig) -> LayerConfig:
        attention, inner = c.attention, c.mlp
        if isinstance(attention, AttentionConfig) and attention.fused == "concatenated":
            attention = dataclasses.replace(attention, fused=None, ways=1)
        if isinstance(inner, MoEConfig):
            shared = inner.shared and mlp(inner.shared)
            inner = dataclasses.replace(inner, expert=mlp(inner.expert), shared=shared)
        else:
            inner = mlp(inner)
        return dataclasses.replace(c, attention=attention, mlp=inner)

    return dataclasses.replace(config, layers=tuple(map(layer, config.layers)))


def merged(config: ModelConfig, leaves: dict[str, Weight]) -> ModelConfig:
    """Merge, in place, all that `obstacle` has nothing against.

    Parts on a mesh are merged on each device: see ``ways`` of `awq_jax.models.layers.fused_columns`.

    Parts leave ``leaves`` as they are merged: memory grows by those of one module at most.

    Args:
      config: of the model.
      leaves: its parameters by path (see `awq_jax.paths.flatten`).

    Returns:
      The config of the same model with fused linears, which ``leaves`` are then the parameters of.
    """
    layers = list(config.layers)
    for linears in fusable(config):
        names = [f"{linears.module}/{part}" for part in linears.parts]
        kernels = [leaves[f"{name}/kernel"] for name in names]
        biases = {leaves[b].dtype for n in names if (b := f"{n}/bias") in leaves}
        if obstacle(kernels) is not None or len(biases) > 1:
            continue
        place = getattr(kernels[0], "placement", None)
        ways = 1 if place is None else place.size
        del kernels
        layers[linears.layer] = linears.fused(layers[linears.layer], ways)
        for kind in ("kernel", "bias"):
            if f"{names[0]}/{kind}" in leaves:
                leaves[f"{linears.module}/{linears.whole}/{kind}"] = join(
                    [leaves.pop(f"{n}/{kind}") for n in names], ways
                )
    return dataclasses.replace(config, layers=tuple(layers))


def unmerged(config: ModelConfig, fused: ModelConfig, leaves: dict[str, Weight]) -> None:
    """The inverse of `merged`, in place and to the bit.

    Args:
      config: of the model.
      fused: what `merged` made of it.
      leaves: parameters of the fused model by path.
    """
    still = {(linears.module, linears.whole) for linears in fusable(fused)}
    for linears in fusable(config):
        if (linears.module, linears.whole) in still:
            continue
        widths = sizes(config.layers[linears.layer], linears)
        ways = ways_of(fused.layers[linears.layer], linears)
        for kind in ("kernel", "bias"):
            if (whole := leaves.pop(f"{linears.module}/{linears.whole}/{kind}", None)) is not None:
                parts = split(whole, widths, ways)
                leaves.update(zip([f"{linears.module}/{n}/{kind}" for n in linears.parts], parts, strict=True))


def assemble(config: ModelConfig, leaves: dict[str, Weight]) -> tuple[nnx.GraphDef, nnx.State]:
    """The decoder's static part, and its state with these parameters."""
    graphdef, state = model_params.abstract(config)
    return graphdef, paths.map_with_path(lambda path, _: leaves[path], state)


def sizes(layer: LayerConfig, linears: FusedLinears) -> list[int]:
    """Columns of each part."""
    c = layer.attention
    if linears.whole == "qkv_proj" and isinstance(c, AttentionConfig):
        return [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
    return [_mlp(layer, linears).size] * 2


def ways_of(layer: LayerConfig, linears: FusedLinears) -> int:
    """In how many runs of columns fused linears lie; see `awq_jax.models.layers.fused_columns.split`."""
    if linears.whole == "qkv_proj" and isinstance(layer.attention, AttentionConfig):
        return layer.attention.ways
    return _mlp(layer, linears).ways


def _mlp(layer: LayerConfig, linears: FusedLinears) -> MLPConfig:
    mlp: Any = layer.mlp
    if isinstance(mlp, MoEConfig):
        return mlp.shared if linears.module.endswith("shared_expert") else mlp.expert  # type: ignore[return-value]
    return mlp


def obstacle(kernels: Sequence[Weight]) -> str | None:
    """Why these kernels, float or packed, cannot be one, or None if they can."""
    packed = [k for k in kernels if isinstance(k, QuantizedTensor)]
    if any(len(a.devices()) > 1 for k in kernels for a in jax.tree.leaves(k)):
        places = {k.placement for k in packed} if len(packed) == len(kernels) else {None}
        by_column = len(places) == 1 and all(p is not None and p.dim == "n" and not p.gather for p in places)
        if not by_column or packed[0].batch:
            return "they are spread over several devices, and not all by columns"
    if not packed:
        return None if len({k.dtype for k in kernels}) == 1 else "their dtypes differ"
    if len(packed) < len(kernels):
        return "some are packed and some are not"
    first = packed[0]
    for field in ("bits", "group_size", "axes", "k_dims", "dtype", "layout", "symmetric"):
        if len({getattr(k, field) for k in kernels}) > 1:
            return f"they differ in {field}"
    if first.axes not in ("kn", "bkn") or first.layout != "canonical":
        return f"their axes are {first.axes} and their layout is {first.layout}"
    for field in ("scales", "zeros", "offsets"):
        if len({getattr(getattr(k, field), "dtype", None) for k in kernels}) > 1:
            return f"they differ in the dtype of {field}"
    for field in ("inv_scale", "perm"):
        tables = [getattr(k, field) for k in kernels]
        if any((t is None) != (tables[0] is None) for t in tables):
            return f"some have {field} and some have not"
        if tables[0] is not None and not all(np.array_equal(tables[0], t) for t in tables[1:]):
            return f"they differ in {field}"
    return None


def join(parts: Sequence[Weight], ways: int = 1) -> Weight:
    """Kernels or biases without an `obstacle` side by side: float ``[..., N]``, or packed."""
    packed = [p for p in parts if isinstance(p, QuantizedTensor)]
    if not packed:
        return fused_columns.join(cast(Sequence[jax.Array], parts), ways)
    tables = {f: [getattr(p, f) for p in packed] for f in COLUMNS if getattr(packed[0], f) is not None}
    joined: Any = functools.partial(jax.tree.map, lambda t: fused_columns.join(t, ways), is_leaf=_is_list)
    whole = dataclasses.replace(packed[0], n_dims=(sum(p.n for p in packed),))
    return _placed(joined, tables, whole)


def split(whole: Weight, sizes: Sequence[int], ways: int = 1) -> Sequence[Weight]:
    """The parts of a kernel or bias, ``sizes`` columns each."""
    if not isinstance(whole, QuantizedTensor):
        return fused_columns.split(whole, sizes, ways)
    tables = {f: getattr(whole, f) for f in COLUMNS if getattr(whole, f) is not None}
    parts = []
    for i, n in enumerate(sizes):
        pick: Any = functools.partial(jax.tree.map, lambda a, i=i: fused_columns.split(a, sizes, ways)[i])
        parts.append(_placed(pick, tables, dataclasses.replace(whole, n_dims=(n,))))
    return parts


def _placed(
    f: Callable[[Mapping[str, object]], dict[str, Any]], tables: Mapping[str, object], whole: QuantizedTensor
) -> QuantizedTensor:
    """``whole`` with the tables that ``f`` makes, which lie where those of ``whole`` do."""
    if whole.placement is None:
        return dataclasses.replace(whole, **f(tables))
    where = parallel.shardings(whole, whole.placement)
    return dataclasses.replace(whole, **jax.jit(f, out_shardings={t: getattr(where, t) for t in tables})(tables))


def _is_list(a: object) -> bool:
    return isinstance(a, list)
