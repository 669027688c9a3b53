"""Adapters beside the weights of the reference decoder: which factor belongs to which parameter, one or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from awq_jax import paths
from awq_jax.adapters.files import Adapter, Factors
from awq_jax.errors import ConfigError, FormatError, ShapeError
from awq_jax.kernels.adapted import Adapted
from awq_jax.models.config import ModelConfig
from awq_jax.models.layers import fused_columns
from awq_jax.models.layers.moe import by_expert
from awq_jax.models.weights import fuse, modules
from awq_jax.placement import Placement
from awq_jax.qtensor import QuantizedTensor, Weight

Pair = tuple[jax.Array, jax.Array]  # a [*B, K, R], scaled, and b [*B, R, N]
EMBEDDING = "embed_tokens/embedding"


@dataclasses.dataclass(frozen=True)
class Placed:
    """An adapter by our parameters.

    Attributes:
      pairs: path -> factors.
      whole: path -> what replaces the parameter.
    """

    pairs: dict[str, Pair]
    whole: dict[str, jax.Array]


def placed(adapter: Adapter, config: ModelConfig) -> Placed:
    """The factors of an adapter by our parameters.

    Raises:
      FormatError: a factor or a whole tensor belongs to no parameter of such a model.
      ShapeError: one does not fit its parameter.
    """
    all_linears = list(modules.linears(config))
    spelled = {name: linear.module for linear in all_linears for name in config.names.spellings(linear.module)}
    by_module: dict[str, Factors] = {}
    for module, f in adapter.factors.items():
        if module not in spelled:
            raise FormatError(
                f"{adapter.name} has factors of {module}, which a {config.family} model does not have: it is for "
                f"another model (linears here are called like {all_linears[0].module})"
            )
        by_module[spelled[module]] = f
    found: dict[str, dict[int | None, Pair]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for linear in all_linears:
        if linear.module not in by_module:
            continue
        f = by_module[linear.module]
        if linear.expert is None and len(linear.shape) > 2:
            raise FormatError(f"{adapter.name} has factors of {linear.module}, which holds experts: they are not read")
        a, b = f.a.T.astype(np.float32) * np.float32(f.scale), f.b.T.astype(np.float32)
        if linear.part is not None:
            b = np.asarray(linear.part.of(jnp.asarray(b)))
        k, n = linear.shape[-2:]
        if a.shape[0] != k or b.shape[1] != n:
            raise ShapeError(
                f"{adapter.name}: the factors of {linear.module} are for {a.shape[0]} inputs and {b.shape[1]} outputs; "
                f"the model has {k} and {n}"
            )
        found.setdefault(linear.path, {})[linear.expert] = jnp.asarray(a), jnp.asarray(b)
        shapes[linear.path] = linear.shape
    pairs = {path: _of_experts(own, shapes[path]) for path, own in found.items()}
    return Placed(pairs, _whole(adapter, config))


def _of_experts(found: Mapping[int | None, Pair], shape: tuple[int, ...]) -> Pair:
    """The factors of one parameter: those of its experts on top of each other, zeros where an expert has none."""
    if None in found:
        return found[None]
    rank = max(a.shape[1] for a, _ in found.values())
    none = jnp.zeros((shape[-2], 0)), jnp.zeros((0, shape[-1]))
    each = [widened(found.get(e, none), rank) for e in range(shape[0])]
    return jnp.stack([a for a, _ in each]), jnp.stack([b for _, b in each])


def widened(pair: Pair, rank: int) -> Pair:
    """The same product with factors of a larger rank."""
    a, b = pair
    pad = [(0, 0)] * (a.ndim - 2)
    more = rank - a.shape[-1]
    return jnp.pad(a, [*pad, (0, 0), (0, more)]), jnp.pad(b, [*pad, (0, more), (0, 0)])


def _whole(adapter: Adapter, config: ModelConfig) -> dict[str, jax.Array]:
    """Tensors that replace parameters: of the embedding and of an untied head."""
    out: dict[str, jax.Array] = {}
    ours = {EMBEDDING: False, "lm_head/kernel": True}
    names = {n: path for path in ours for n in config.names.spellings(config.names.of(path))}
    for name, value in adapter.whole.items():
        path = names.get(name)
        if path is None or (path == "lm_head/kernel" and config.tied):
            raise FormatError(
                f"{adapter.name} brings {name} (modules_to_save); of whole tensors only those of the embedding"
                f"{'' if config.tied else ' and the head'} are read: train without modules_to_save"
            )
        want = (config.vocab_size, config.embed_size or config.hidden_size)
        if value.shape != want:
            raise ShapeError(f"{adapter.name}: {name} has shape {value.shape}, and the model's has {want}")
        out[path] = jnp.asarray(value.T if ours[path] else value)
    return out


class Attached:
    """Adapters of one model, ready to stand beside its weights.

    Args:
      adapters: by name, in the base's terms (see `awq_jax.adapters.base.fitted`).
      config: of the model.
      place: the mesh its weights are spread over; every device has all factors.

    Attributes:
      names: of the adapters, in order.
    """

    def __init__(self, adapters: Mapping[str, Adapter], config: ModelConfig, place: Placement | None = None) -> None:
        self._config, self._place = config, place
        self.placed = {name: placed(adapter, config) for name, adapter in adapters.items()}
        self.names = tuple(self.placed)
        self._tables: dict[tuple[str, ModelConfig], dict[str, Pair]] = {}

    def one(self, params: nnx.State, name: str | None, fused: ModelConfig | None = None) -> nnx.State:
        """``params`` with one adapter beside its weights; with none for None.

        Args:
          fused: the config that ``params`` are of, if linears in it were merged.

        Raises:
          ConfigError: there is no adapter of that name.
        """
        if name is None:
            return params
        self.check([name])
        pairs = self._pairs(name, fused or self._config)
        whole = self.placed[name].whole

        def beside(path: str, leaf: Weight) -> Weight:
            if path in whole:
                return whole[path].astype(leaf.dtype)
            return leaf if path not in pairs else adapted(leaf, *pairs[path])

        return paths.map_with_path(beside, params)

    def each(self, params: nnx.State, names: Sequence[str | None], fused: ModelConfig | None = None) -> nnx.State:
        """``params`` with the adapters named beside its weights, for a batch whose rows have one each, or none.

        Raises:
          ConfigError: there is no adapter of a name, or adapters of rows differ in more than factors of linears.
        """
        self.check(names)
        different = list(dict.fromkeys(names))
        if len(different) == 1:
            return self.one(params, different[0], fused)
        used = [n for n in different if n is not None]
        row = jnp.asarray([used.index(n) if n is not None else -1 for n in names], jnp.int32)
        return self._stacked(params, used, row, fused)

    def all(self, params: nnx.State, fused: ModelConfig | None = None) -> nnx.State:
        """``params`` with all adapters beside its weights, by their places in `names`, for rows that are told later
        (see `awq_jax.kernels.adapted.of_rows`).

        Raises:
          ConfigError: adapters differ in more than factors of linears.
        """
        return self._stacked(params, self.names, jnp.full(1, -1, jnp.int32), fused)

    def _stacked(self, params: nnx.State, used: Sequence[str], row: jax.Array, fused: ModelConfig | None) -> nnx.State:
        tables = {n: self._pairs(n, fused or self._config) for n in used}
        for n in used:
            stacked = [path for path, (a, _) in tables[n].items() if a.ndim > 2]
            if self.placed[n].whole or stacked:
                what = "a whole tensor" if self.placed[n].whole else f"experts ({stacked[0]})"
                raise ConfigError(f"adapter {n!r} changes {what}, so that it has to be alone in a batch")

        def beside(path: str, leaf: Weight) -> Weight:
            own = [tables[n].get(path) for n in used]
            if not any(p is not None for p in own):
                return leaf
            rank = max(p[0].shape[-1] for p in own if p is not None)
            k, n_ = leaf.shape[-2:] if not isinstance(leaf, QuantizedTensor) else (leaf.k, leaf.n)
            none = jnp.zeros((k, 0)), jnp.zeros((0, n_))
            wide = [widened(none if p is None else p, rank) for p in own]
            return adapted(leaf, jnp.stack([a for a, _ in wide]), jnp.stack([b for _, b in wide]), row)

        return paths.map_with_path(beside, params)

    def check(self, names: Iterable[str | None]) -> None:
        """Refuse names of no adapter.

        Raises:
          ConfigError: naming those there are.
        """
        for name in names:
            if name is not None and name not in self.placed:
                there = ", ".join(map(repr, self.names)) or "none"
                raise ConfigError(f"there is no adapter {name!r}; the model was loaded with {there}")

    def _pairs(self, name: str, fused: ModelConfig) -> dict[str, Pair]:
        key = name, fused
        if key not in self._tables:
            pairs = merged(self.placed[name].pairs, self._config, fused)
            if self._place is not None:
                pairs = jax.device_put(pairs, self._place.sharding(PartitionSpec()))
            self._tables[key] = pairs
        return self._tables[key]


def adapted(leaf: Weight, a: jax.Array, b: jax.Array, row: jax.Array | None = None) -> Adapted:
    """A kernel of the reference decoder with factors beside it."""
    leaf = by_expert(leaf)
    axes = "kn" if len(leaf.shape) == 2 else "bkn"
    return Adapted.of(leaf, a, b, axes, row)


def merged(pairs: Mapping[str, Pair], config: ModelConfig, fused: ModelConfig) -> dict[str, Pair]:
    """Factors of a model whose linears were merged (`awq_jax.models.weights.fuse.merged`); their ranks add up."""
    out = dict(pairs)
    still = {(linears.module, linears.whole) for linears in fuse.fusable(fused)}
    for linears in fuse.fusable(config):
        if (linears.module, linears.whole) in still:
            continue
        names = [f"{linears.module}/{part}/kernel" for part in linears.parts]
        own = [out.pop(n, None) for n in names]
        if not any(p is not None for p in own):
            continue
        widths = fuse.sizes(config.layers[linears.layer], linears)
        ways = fuse.ways_of(fused.layers[linears.layer], linears)
        out[f"{linears.module}/{linears.whole}/kernel"] = _side_by_side(own, widths, ways)
    return out


def _side_by_side(pairs: Sequence[Pair | None], widths: Sequence[int], ways: int) -> Pair:
    a = jnp.concatenate([p[0] for p in pairs if p is not None], axis=-1)
    rows = []
    for i, pair in enumerate(pairs):
        if pair is not None:
            lead = pair[1].shape[:-1]
            parts = [pair[1] if j == i else jnp.zeros((*lead, n)) for j, n in enumerate(widths)]
            rows.append(fused_columns.join(parts, ways))
    return a, jnp.concatenate(rows, axis=-2)
