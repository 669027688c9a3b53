"""One scale group at a time: from leaves and statistics to a scale, and to packed weights."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax import pack
from awq_jax.algorithm.compensation import GramFactor
from awq_jax.algorithm.grid import column_loss, quantize_dequantize
from awq_jax.algorithm.methods import METHODS, Method
from awq_jax.algorithm.round_matrix import round_matrix
from awq_jax.calibration import shrinkage
from awq_jax.calibration.calibration import Stats
from awq_jax.calibration.grams import all_finite
from awq_jax.calibration.means import Means, means_of
from awq_jax.config import AwqConfig, LeafConfig
from awq_jax.devices.pool import HERE, Pool
from awq_jax.pack import Array
from awq_jax.plan import fold
from awq_jax.plan.plan import Plan, ScaleGroup
from awq_jax.qtensor import QuantizedTensor, Weight, split_shape
from awq_jax.quantizer import parts
from awq_jax.quantizer.column_pieces import CanonicalWeight, Columns, Place, scale_to_batched, sweep, to_batched
from awq_jax.quantizer.scale_search import search
from awq_jax.quantizer.targets import Target, scale_dtype
from awq_jax.report import LayerReport

IN_PLACE = 4096  # channels from which on memory for one more Gram outweighs a program that saves it
NO_TOKENS = "no finite activations were seen in calibration: rounded to nearest"


@dataclasses.dataclass(frozen=True)
class GroupScale:
    """What the search decided for one group.

    Attributes:
      scale: float32 ``[*scan, *batch, K]`` (NumPy), or None for 1 everywhere.
      ratio: mean exponent chosen, None if 1.
      reason: why the scale is 1, or what a user should know about it; "" otherwise.
    """

    scale: np.ndarray | None
    ratio: float | None = None
    reason: str = ""


def find_scale(
    group: ScaleGroup,
    targets: list[Target],
    leaves: Mapping[str, Weight],
    stats: Stats | None,
    config: AwqConfig,
    pool: Pool = HERE,
) -> GroupScale:
    """Search the scale of ``group``, or say why it stays 1.

    Args:
      targets: the weights of the group that will be quantized (at least one).
      leaves: all float parameters by path.
      stats: the group's calibration sums; None only where the method needs none.
      pool: devices that share the work.
    """
    method = METHODS[config.method]
    if not method.needs_statistics or stats is None:
        return GroupScale(None)
    if not group.absorbers and not config.explicit_scale:
        return GroupScale(None, reason=group.reason or "no parameter can absorb the scale")
    if not group.absorbers and any(parts.whole_only(t.site) for t in targets):
        return GroupScale(None, reason=group.reason or "no parameter can absorb the scale of a part of a weight")
    means = means_of(group, stats)
    if means is None:
        return GroupScale(None, reason=NO_TOKENS)
    rows = math.lcm(*(t.leaf.group_size for t in targets))
    rows *= -(-group.channels // rows)
    every = [(t.leaf, CanonicalWeight.of(t, leaves[t.site.path])) for t in targets]
    weights = [(leaf, Columns([p for other, p in every if other == leaf], rows)) for leaf in dict.fromkeys(dict(every))]
    dtypes = {scale_dtype(p.largest(), leaf, config) for leaf, p in every}
    found = []
    for layer in range(math.prod(group.scan)):
        absmean = np.pad(means.absmean[layer], ((0, 0), (0, rows - group.channels)))
        energies = _energies(pool, means, layer, len(absmean), rows, method, config)

        def metric(e: int, layer: int = layer, energies: np.ndarray | None = energies) -> Array:
            if energies is not None:
                return energies[e]
            return _mean(means.collect_gram(layer, e), rows=rows, shrink=_shrink(config))

        found.append(
            search(
                weights,
                metric,
                absmean if energies is None else np.sqrt(energies),
                _padded_shared_channels(group, rows),
                layer=layer,
                n_grid=config.n_grid,
                joint=_experts_share_channels(group),
                dtype="float32" if "float32" in dtypes else config.scale_dtype,
                pool=pool,
            )
        )
    ratios = np.concatenate([f.ratio for f in found])
    if np.isnan(ratios).all():
        return GroupScale(None, reason="; ".join(filter(None, ("no scale beat plain rounding", means.note))))
    scale = np.stack([f.scale[:, : group.channels] for f in found]).reshape(*group.scan, *group.batch, group.channels)
    if over := _overflows(group, targets, leaves, scale):
        return GroupScale(None, reason=f"the scale does not fit into {over}")
    return GroupScale(scale, float(np.nanmean(ratios)), means.note)


def round_group(
    group: ScaleGroup,
    targets: list[Target],
    leaves: Mapping[str, Weight],
    folded: fold.Folder,
    found: GroupScale,
    stats: Stats | None,
    config: AwqConfig,
    pool: Pool = HERE,
    consume: bool = False,
    aims: Mapping[str, Weight] = MappingProxyType({}),
) -> dict[str, tuple[QuantizedTensor, LayerReport]]:
    """Round and pack the targets of one group; those stored alike are rounded as one matrix.

    Args:
      folded: applies the scales of *all* groups: a weight here may absorb another group's scale.
      found: this group's scale.
      pool: devices that share the work.
      consume: ``stats`` are not needed any more, and their memory may be used.
      aims: by path, what to round in place of a leaf.
    """
    means = means_of(group, stats) if stats is not None else None
    out: dict[str, tuple[QuantizedTensor, LayerReport]] = {}
    by_leaf: dict[LeafConfig, list[Target]] = {}
    for t in targets:
        by_leaf.setdefault(t.leaf, []).append(t)
    for leaf, alike in by_leaf.items():
        # In float32: a scaled weight need not fit the leaf's own dtype, and codes are made of it anyway.
        whole = [aims.get(t.site.path, leaves[t.site.path]) for t in alike]
        weights = [CanonicalWeight.of(t, w, folded.steps(t.site.path)) for t, w in zip(alike, whole, strict=True)]
        columns = Columns(weights, alike[0].rows)
        dtype = scale_dtype(columns.largest(), leaf, config)
        once = len(by_leaf) * math.prod(group.scan) * math.prod(group.batch) * pool.size == 1
        free = consume and once and columns.rows == group.channels >= IN_PLACE
        prepare = _prepare_in_place if free else _prepare
        rounded = _round(columns, means, group, found, leaf, config, dtype, pool, prepare)
        start = 0
        for t, p in zip(alike, weights, strict=True):
            mine = _Packed(*(a[..., start : start + p.columns] for a in rounded))
            start += p.columns
            q = _assemble(t, group, leaves[t.site.path], mine, found)
            row = _row(t, group, leaves[t.site.path], q, mine, found, means)
            out[t.site.name] = (q, row)
    return out


class _Packed(NamedTuple):
    """Rounded columns and their errors, ``[S, E, ..., N]``.

    Attributes:
      qweight: uint32 codes, packed.
      scales, zeros: of the groups.
      loss, clipped: see `awq_jax.algorithm.round_matrix.Rounded`.
      energy: expected squared output of each column.
      rtn: loss of plain rounding without a scale.
      shrunk: by which share the Gram was shrunk, of each column.
    """

    qweight: Array
    scales: Array
    zeros: Array
    loss: Array
    clipped: Array
    energy: Array
    rtn: Array
    shrunk: Array


_Sums = tuple[jax.Array, np.float32]  # of `awq_jax.calibration.means.Means.collect_gram`


class _Given(NamedTuple):
    """What the columns of one instance have in common: the shrunk Gram of the scaled input, its factor, the scale,
    by which share the Gram was shrunk, and `Method.channel_energy`, if the method has one."""

    gram: jax.Array | None
    factor: GramFactor | None
    scale: jax.Array
    shrunk: jax.Array
    energy: jax.Array | None


def _round(
    columns: Columns,
    means: Means | None,
    group: ScaleGroup,
    found: GroupScale,
    leaf: LeafConfig,
    config: AwqConfig,
    dtype: str,
    pool: Pool,
    preparation: Callable[..., _Given],
) -> _Packed:
    layers, experts = math.prod(group.scan), math.prod(group.batch)
    lead = (layers, experts, group.channels)
    scale = np.ones(lead, np.float32) if found.scale is None else np.asarray(found.scale).reshape(lead)
    method = METHODS[config.method]
    instances: list[_Packed] = []
    for layer in range(layers):

        def fetch(e: int, layer: int = layer) -> tuple[_Sums | None, np.ndarray]:
            return None if means is None else means.collect_gram(layer, e), scale[layer, e]

        def prepare(given: tuple[_Sums | None, np.ndarray]) -> _Given:
            sums, s = given
            chosen = {"method": method, "damping": config.damping, "shrink": _shrink(config)}
            return preparation(*(sums or (None, None)), s, rows=columns.rows, **chosen)

        def run(place: Place, e: int, piece: int, given: _Given, layer: int = layer) -> _Packed:
            w = place(columns.piece(layer, e, piece))
            return _round_piece(w, given, leaf=leaf, method=method, clip=config.clip, dtype=dtype)

        for pieces in sweep(pool, experts, columns.pieces, fetch, prepare, run):
            instances.append(
                _Packed(*(np.concatenate(a, axis=-1)[..., : columns.total] for a in zip(*pieces, strict=True)))
            )
    return _Packed(*(np.stack(a).reshape(layers, experts, *a[0].shape) for a in zip(*instances, strict=True)))


def _given(
    gram: jax.Array | None,
    count: np.float32 | None,
    scale: jax.Array,
    *,
    rows: int,
    method: Method,
    damping: float,
    shrink: float | None,
) -> _Given:
    s = jnp.pad(scale, (0, rows - len(scale)), constant_values=1.0)
    if gram is None or count is None:
        return _Given(None, None, s, jnp.zeros((), jnp.float32), None)
    mean, share = _square((gram, count), rows, shrink)
    scaled = mean / (s[:, None] * s[None, :])
    factor = method.rounder.prepare(scaled, damping)
    energy = None if method.channel_energy is None else method.channel_energy(scaled, factor)
    return _Given(scaled, factor, s, share, energy)


_STATIC = ("rows", "method", "damping", "shrink")
_prepare = jax.jit(_given, static_argnames=_STATIC)
_prepare_in_place = jax.jit(_given, static_argnames=_STATIC, donate_argnames="gram")


@functools.partial(jax.jit, static_argnames=("leaf", "method", "clip", "dtype"))
def _round_piece(w: jax.Array, given: _Given, *, leaf: LeafConfig, method: Method, clip: bool, dtype: str) -> _Packed:
    """Round ``w [K, C]``, which the scale is already multiplied into."""
    gram, factor, s, shrunk, _ = given
    judge = gram if method.needs_statistics else None
    r = round_matrix(w, judge, factor, rounder=method.rounder, leaf=leaf, clip=clip, dtype=dtype)
    energy = rtn = loss = r.loss
    if gram is not None:
        plain = w / s[:, None]
        error = (quantize_dequantize(plain, leaf.group_size, leaf.bits, leaf.symmetric, dtype) - plain) * s[:, None]
        rtn = _as_seen(column_loss(error, gram), error, gram, shrunk)
        energy = _as_seen(column_loss(w, gram) if judge is None else r.energy, w, gram, shrunk)
        loss = _as_seen(r.loss, r.decode(leaf.group_size) - w, gram, shrunk) if method.needs_statistics else rtn
    share = jnp.broadcast_to(shrunk, loss.shape)
    return _Packed(pack.pack(r.codes, leaf.bits), r.scale.astype(dtype), r.zero, loss, r.clipped, energy, rtn, share)


def _as_seen(loss: jax.Array, delta: jax.Array, gram: jax.Array, share: jax.Array) -> jax.Array:
    """Losses ``[N]`` of ``delta [K, N]`` by the Gram that the calibration tokens have, from those by the shrunk one."""
    diagonal = column_loss(delta, jnp.diagonal(gram))
    return jnp.maximum((loss - share * diagonal) / (1 - share), 0.0)


def _shrink(config: AwqConfig) -> float | None:
    """By which share Grams are shrunk; None: each by its own. Plain rounding weighs nothing: its errors are as seen."""
    return config.shrinkage if METHODS[config.method].needs_statistics else 0.0


def _energies(
    pool: Pool, means: Means, layer: int, experts: int, rows: int, method: Method, config: AwqConfig
) -> np.ndarray | None:
    """`Method.channel_energy` of every instance, float32 ``[E, rows]``; None if the method has none."""
    if method.channel_energy is None:
        return None
    chosen = {"method": method, "damping": config.damping, "shrink": _shrink(config)}
    ones = np.ones(means.absmean.shape[-1], np.float32)  # scales: then it is the program that rounding uses
    made = sweep(
        pool,
        experts,
        1,
        lambda e: means.collect_gram(layer, e),
        lambda sums: _prepare(*sums, ones, rows=rows, **chosen).energy,
        lambda place, e, piece, energy: energy,
    )
    return np.stack([energy for (energy,) in made])


def _square(sums: _Sums, rows: int, shrink: float | None) -> tuple[jax.Array, jax.Array]:
    """The mean Gram, shrunk, with channels of no energy up to ``rows``; and the share by which it was."""
    gram, count = sums
    share = shrinkage.share(gram, count) if shrink is None else jnp.float32(shrink)
    mean = gram / count
    mean = mean if shrink == 0 else shrinkage.shrunk(mean, share)
    return jnp.pad(mean, (0, rows - len(gram))), share


@functools.partial(jax.jit, static_argnames=("rows", "shrink"))
def _mean(sums: _Sums, *, rows: int, shrink: float | None) -> jax.Array:
    return _square(sums, rows, shrink)[0]


def _assemble(t: Target, group: ScaleGroup, leaf: Weight, rounded: _Packed, found: GroupScale) -> QuantizedTensor:
    _, k_dims, n_dims = split_shape(t.site.part_shape, t.site.canonical_axes)
    inverse = None
    if found.scale is not None and not group.absorbers:
        inverse = jax.device_put(scale_to_batched(np.float32(1.0) / found.scale, t))

    def batched(a: Array) -> jax.Array:
        return jax.device_put(to_batched(np.asarray(a), t))

    return QuantizedTensor(
        qweight=batched(rounded.qweight),
        scales=batched(rounded.scales),
        zeros=None if t.leaf.symmetric else batched(rounded.zeros),
        inv_scale=inverse,
        bits=t.leaf.bits,
        group_size=t.leaf.group_size,
        axes=t.site.canonical_axes,
        k_dims=k_dims,
        n_dims=n_dims,
        dtype=np.dtype(leaf.dtype).name,
    )


def _row(
    t: Target,
    group: ScaleGroup,
    leaf: Weight,
    q: QuantizedTensor,
    rounded: _Packed,
    found: GroupScale,
    means: Means | None,
) -> LayerReport:
    total = float(rounded.energy.sum(dtype=np.float64))
    known = means is not None and total > 0
    return LayerReport(
        path=t.site.name,
        group=group.name,
        shape=t.site.part_shape,
        bits=t.leaf.bits,
        group_size=t.leaf.group_size,
        symmetric=t.leaf.symmetric,
        bytes_before=math.prod(t.site.part_shape) * np.dtype(leaf.dtype).itemsize,
        bytes_after=q.nbytes,
        error_rtn=float(rounded.rtn.sum(dtype=np.float64)) / total if known else None,
        error=float(rounded.loss.sum(dtype=np.float64)) / total if known else None,
        ratio=found.ratio,
        clipped=float(rounded.clipped.mean(dtype=np.float64)),
        shrinkage=float(rounded.shrunk.mean(dtype=np.float64)) if known else None,
        scale="none" if found.scale is None else ("folded" if group.absorbers else "explicit"),
        reason=found.reason,
    )


def _overflows(group: ScaleGroup, targets: list[Target], leaves: Mapping[str, Weight], scale: np.ndarray) -> str:
    """What stays float and would become infinite in its own dtype, "" if nothing."""
    if not group.absorbers:
        return ""
    folder = fold.Folder(Plan((group,)), {group.name: scale})
    touched = dict.fromkeys([a.path for a in group.absorbers] + [s.path for s in group.sites])
    stays = [path for path in touched if path not in {t.site.path for t in targets}]
    over = (p for p in stays if not all_finite(cast(Array, folder.leaf(p, leaves[p]))))
    return next((f"{p} ({leaves[p].dtype})" for p in over), "")


def _experts_share_channels(group: ScaleGroup) -> bool:
    if group.shared_channels is None or not group.batch:
        return False
    own = np.repeat(np.arange(math.prod(group.batch)), group.channels)
    return bool(np.any(np.asarray(group.shared_channels) // group.channels != own))


def _padded_shared_channels(group: ScaleGroup, rows: int) -> np.ndarray | None:
    """The group's shared channels over ``rows`` channels per expert; padding channels share with nothing."""
    if group.shared_channels is None:
        return None
    old = np.asarray(group.shared_channels).reshape(-1, group.channels)
    shared = np.arange(len(old) * rows, dtype=np.int32).reshape(len(old), rows)
    shared[:, : group.channels] = old // group.channels * rows + old % group.channels
    return shared.reshape(-1)
