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
from awq_jax.algorithm.grid import column_loss, quantize_dequantize
from awq_jax.algorithm.methods import METHODS, Method
from awq_jax.algorithm.round_matrix import round_matrix
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
from awq_jax.quantizer.group_inputs import (
    How,
    Input,
    KeptInputs,
    Sums,
    mean_gram,
    of_sums,
    of_sums_in_place,
    scaled,
    scaled_in_place,
)
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
    kept: KeptInputs | None = None,
) -> GroupScale:
    """Search the scale of ``group``, or say why it stays 1.

    Args:
      targets: the weights of the group that will be quantized (at least one).
      leaves: all float parameters by path.
      stats: the group's calibration sums; None only where the method needs none.
      pool: devices that share the work.
      kept: takes what rounding can use of the group's input.
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
    how, keep = How.of(config, rows), KeptInputs(False) if kept is None else kept
    found = []
    for layer in range(math.prod(group.scan)):
        absmean = np.pad(means.absmean[layer], ((0, 0), (0, rows - group.channels)))
        energies = _energies(pool, means, layer, len(absmean), how, functools.partial(keep.put, group.name, stats))

        def metric(e: int, layer: int = layer, energies: np.ndarray | None = energies) -> Array:
            if energies is not None:
                return energies[e]
            return mean_gram(*means.collect_gram(layer, e), how)

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
    kept: KeptInputs | None = None,
) -> dict[str, tuple[QuantizedTensor, LayerReport]]:
    """Round and pack the targets of one group; those stored alike are rounded as one matrix.

    Args:
      folded: applies the scales of *all* groups: a weight here may absorb another group's scale.
      found: this group's scale.
      pool: devices that share the work.
      consume: ``stats`` are not needed any more, and their memory may be used.
      aims: by path, what to round in place of a leaf.
      kept: what the search made of the group's input.
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
        how = How.of(config, columns.rows)

        def known(instance: int, how: How = how) -> Input | None:
            return None if kept is None else kept.get(group.name, stats, instance, how)

        prepare = functools.partial(of_sums_in_place if free else of_sums, how=how)
        rounded = _round(columns, means, group, found, leaf, config, dtype, pool, known, prepare)
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


def _round(
    columns: Columns,
    means: Means | None,
    group: ScaleGroup,
    found: GroupScale,
    leaf: LeafConfig,
    config: AwqConfig,
    dtype: str,
    pool: Pool,
    known: Callable[[int], Input | None],
    prepare: Callable[..., Input],
) -> _Packed:
    layers, experts = math.prod(group.scan), math.prod(group.batch)
    lead = (layers, experts, group.channels)
    scale = np.ones(lead, np.float32) if found.scale is None else np.asarray(found.scale).reshape(lead)
    method = METHODS[config.method]
    nothing = Input(None, None, jax.device_put(np.float32(0)), None)
    instances: list[_Packed] = []
    for layer in range(layers):

        def fetch(e: int, layer: int = layer) -> tuple[Input | Sums | None, np.ndarray]:
            made: Input | Sums | None = known(layer * experts + e)
            if made is None and means is not None:
                made = means.collect_gram(layer, e)
            return made, scale[layer, e]

        def of_scaled(given: tuple[Input | Sums | None, np.ndarray]) -> Input:
            made, s = given
            if made is None:
                return nothing
            return scaled(made, s) if isinstance(made, Input) else scaled_in_place(prepare(*made), s)

        def run(place: Place, e: int, piece: int, given: Input, layer: int = layer) -> _Packed:
            w = place(columns.piece(layer, e, piece))
            s = np.pad(scale[layer, e], (0, columns.rows - group.channels), constant_values=1)
            return _round_piece(w, given, s, leaf=leaf, method=method, clip=config.clip, dtype=dtype)

        for pieces in sweep(pool, experts, columns.pieces, fetch, of_scaled, run):
            instances.append(
                _Packed(*(np.concatenate(a, axis=-1)[..., : columns.total] for a in zip(*pieces, strict=True)))
            )
    return _Packed(*(np.stack(a).reshape(layers, experts, *a[0].shape) for a in zip(*instances, strict=True)))


@functools.partial(jax.jit, static_argnames=("leaf", "method", "clip", "dtype"))
def _round_piece(
    w: jax.Array, given: Input, s: jax.Array, *, leaf: LeafConfig, method: Method, clip: bool, dtype: str
) -> _Packed:
    """Round ``w [K, C]``, which the scale ``s [K]`` is already multiplied into; ``given`` is scaled, too."""
    gram, factor, shrunk, _ = given
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


def _energies(
    pool: Pool, means: Means, layer: int, experts: int, how: How, keep: Callable[[int, How, Input], None]
) -> np.ndarray | None:
    """`Method.channel_energy` of every instance, float32 ``[E, rows]``; None if the method has none.

    Args:
      keep: takes the number of an instance, how its input was made, and that.
    """
    if how.method.channel_energy is None:
        return None

    def energy(place: Place, e: int, piece: int, made: Input) -> jax.Array:
        keep(layer * experts + e, how, made)
        assert made.energy is not None
        return made.energy

    collect = functools.partial(means.collect_gram, layer)
    made = sweep(pool, experts, 1, collect, lambda sums: of_sums(*sums, how), energy)
    return np.stack([energy for (energy,) in made])


def _assemble(t: Target, group: ScaleGroup, leaf: Weight, rounded: _Packed, found: GroupScale) -> QuantizedTensor:
    _, k_dims, n_dims = split_shape(t.site.part_shape, t.site.canonical_axes)
    inverse = None
    if found.scale is not None and not group.is_folded:
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
        scale="none" if found.scale is None else ("folded" if group.is_folded else "explicit"),
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
