"""One scale group at a time: from leaves and statistics to a scale, and to packed weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax import fold, instances, pack
from awq_jax.calibration import Stats
from awq_jax.config import AwqConfig, LeafConfig
from awq_jax.matrix import Rounded, round_matrix
from awq_jax.moments import Moments, moments
from awq_jax.plan import Group, Plan
from awq_jax.qtensor import QuantizedTensor, split_shape
from awq_jax.report import LayerReport
from awq_jax.rounding import column_loss, conditional_energy, quantize_dequantize
from awq_jax.scale import Found, search
from awq_jax.select import Target

NO_TOKENS = "no finite activations were seen in calibration: rounded to nearest"


@dataclasses.dataclass(frozen=True)
class GroupScale:
    """What the search decided for one group.

    Attributes:
      scale: float32 ``[*scan, *batch, K]``, or None for 1 everywhere.
      ratio: mean exponent chosen, None if 1.
      reason: why the scale is 1, or what a user should know about it; "" otherwise.
    """

    scale: jax.Array | None
    ratio: float | None = None
    reason: str = ""


class _SearchConfig(NamedTuple):
    compensated: bool
    n_grid: int
    damping: float


def find_scale(
    group: Group, targets: list[Target], leaves: Mapping[str, Any], stats: Stats | None, config: AwqConfig
) -> GroupScale:
    """Search the scale of ``group``, or say why it stays 1.

    Args:
      targets: the weights of the group that will be quantized (at least one).
      leaves: all float parameters by path.
      stats: the group's calibration sums; needed unless the method is ``"rtn"``.
    """
    if config.method == "rtn" or stats is None:
        return GroupScale(None)
    if not group.absorbers and not config.explicit_scale:
        return GroupScale(None, reason=group.reason or "no parameter can absorb the scale")
    means = moments(group, stats)
    if means is None:
        return GroupScale(None, reason=NO_TOKENS)
    weights = [instances.from_leaf(leaves[t.site.path], t, group) for t in targets]
    step = math.lcm(*(t.leaf.group_size for t in targets))
    rows = -(-group.channels // step) * step
    found = [
        _search(
            tuple(instances.pad_rows(w[i], rows) for w in weights),
            instances.pad_square(means.gram[i], rows),
            instances.pad_channels(means.absmean[i], rows, 0.0),
            _padded_ties(group, rows),
            leaves=tuple(t.leaf for t in targets),
            config=_SearchConfig(config.method == "awq+gptq", config.n_grid, config.damping),
            joint=_ties_cross_experts(group),
            dtype=_widest(_scale_dtype(w, t.leaf) for w, t in zip(weights, targets, strict=True)),
        )
        for i in range(math.prod(group.scan))
    ]
    ratios = np.concatenate([np.asarray(f.ratio) for f in found])
    if np.isnan(ratios).all():
        return GroupScale(None, reason="; ".join(filter(None, ("no scale beat plain rounding", means.note))))
    scale = jnp.stack([f.scale[:, : group.channels] for f in found]).reshape(*group.scan, *group.batch, group.channels)
    if over := _overflows(group, targets, leaves, scale):
        return GroupScale(None, reason=f"the scale does not fit into {over}")
    return GroupScale(scale, float(np.nanmean(ratios)), means.note)


def round_group(
    group: Group,
    targets: list[Target],
    leaves: Mapping[str, Any],
    folded: fold.Folder,
    found: GroupScale,
    stats: Stats | None,
    config: AwqConfig,
) -> dict[str, tuple[QuantizedTensor, LayerReport]]:
    """Round and pack the targets of one group; those stored alike are rounded as one matrix.

    Args:
      folded: applies the scales of *all* groups: a weight here may absorb another group's scale.
      found: this group's scale.
    """
    means = moments(group, stats) if stats is not None else None
    out: dict[str, tuple[QuantizedTensor, LayerReport]] = {}
    by_leaf: dict[LeafConfig, list[Target]] = {}
    for t in targets:
        by_leaf.setdefault(t.leaf, []).append(t)
    for leaf, alike in by_leaf.items():
        # In float32: a scaled weight need not fit the leaf's own dtype, and codes are made of it anyway.
        floats = [folded.leaf(t.site.path, jnp.asarray(leaves[t.site.path]).astype(jnp.float32)) for t in alike]
        weights = [instances.from_leaf(w, t, group) for w, t in zip(floats, alike, strict=True)]
        whole = jnp.concatenate(weights, axis=-1)
        dtype = _scale_dtype(whole, leaf)
        parts = _round_all(whole, alike[0].rows, means, group, found, leaf, config, dtype)
        start = 0
        for t, w in zip(alike, weights, strict=True):
            mine = jax.tree.map(lambda a, lo=start, hi=start + w.shape[-1]: a[..., lo:hi], parts)
            start += w.shape[-1]
            q = _pack(t, group, leaves[t.site.path], mine.rounded, found, dtype)
            row = _row(t, group, leaves[t.site.path], q, mine, found, means)
            out[t.site.path] = (q, row)
    return out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Parts:
    """Rounded columns and their errors, ``[S, E, ..., N]``.

    Attributes:
      rounded: codes, scales, zeros, losses.
      energy: expected squared output of each column.
      rtn: loss of plain rounding without a scale.
    """

    rounded: Rounded
    energy: jax.Array
    rtn: jax.Array


def _round_all(
    whole: jax.Array,
    rows: int,
    means: Moments | None,
    group: Group,
    found: GroupScale,
    leaf: LeafConfig,
    config: AwqConfig,
    dtype: str,
) -> _Parts:
    s, e = whole.shape[:2]
    scale = jnp.ones((s, e, group.channels)) if found.scale is None else found.scale.reshape(s, e, -1)
    parts = [
        _round(
            instances.pad_rows(whole[i], rows),
            None if means is None else instances.pad_square(means.gram[i], rows),
            instances.pad_channels(scale[i], rows, 1.0),
            leaf=leaf,
            method=config.method,
            clip=config.clip,
            damping=config.damping,
            dtype=dtype,
        )
        for i in range(s)
    ]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *parts)


@functools.partial(jax.jit, static_argnames=("leaves", "config", "joint", "dtype"))
def _search(
    weights: tuple[jax.Array, ...],
    gram: jax.Array,
    absmean: jax.Array,
    ties: jax.Array | None,
    *,
    leaves: tuple[LeafConfig, ...],
    config: _SearchConfig,
    joint: bool,
    dtype: str,
) -> Found:
    magnitude = absmean
    if config.compensated:
        gram = jax.vmap(lambda h: conditional_energy(h, config.damping))(gram)
        magnitude = jnp.sqrt(gram)
    return search(weights, gram, magnitude, ties, leaves=leaves, n_grid=config.n_grid, joint=joint, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("leaf", "method", "clip", "damping", "dtype"))
def _round(
    w: jax.Array,
    gram: jax.Array | None,
    scale: jax.Array,
    *,
    leaf: LeafConfig,
    method: str,
    clip: bool,
    damping: float,
    dtype: str,
) -> _Parts:
    """Round ``w [E, K, N]``, which ``scale [E, K]`` is already multiplied into."""

    def one(args: tuple[jax.Array, jax.Array | None, jax.Array]) -> _Parts:
        w, h, s = args
        if h is None or method == "rtn":
            r = round_matrix(w, None, leaf=leaf, compensated=False, clip=False, damping=damping, dtype=dtype)
            if h is None:
                return _Parts(r, r.loss, r.loss)
        scaled = h / (s[:, None] * s[None, :])
        plain = w / s[:, None]
        rtn = column_loss(quantize_dequantize(plain, leaf.group_size, leaf.bits, leaf.symmetric, dtype) - plain, h)
        if method == "rtn":
            r = r._replace(loss=rtn)
        else:
            compensated = method == "awq+gptq"
            r = round_matrix(w, scaled, leaf=leaf, compensated=compensated, clip=clip, damping=damping, dtype=dtype)
        return _Parts(r, column_loss(w, scaled), rtn)

    return jax.lax.map(one, (w, gram, scale))


def _pack(t: Target, group: Group, leaf: Any, rounded: Rounded, found: GroupScale, dtype: str) -> QuantizedTensor:
    _, k_dims, n_dims = split_shape(t.site.shape, t.site.canonical_axes)
    inverse = None
    if found.scale is not None and not group.absorbers:
        inverse = instances.scale_to_batched(1.0 / found.scale, t, group)
    return QuantizedTensor(
        qweight=pack.pack(instances.to_batched(rounded.codes, t, group), t.leaf.bits),
        scales=instances.to_batched(rounded.scale, t, group).astype(dtype),
        zeros=None if t.leaf.symmetric else instances.to_batched(rounded.zero, t, group),
        inv_scale=inverse,
        bits=t.leaf.bits,
        group_size=t.leaf.group_size,
        axes=t.site.canonical_axes,
        k_dims=k_dims,
        n_dims=n_dims,
        dtype=np.dtype(leaf.dtype).name,
    )


def _row(
    t: Target, group: Group, leaf: Any, q: QuantizedTensor, parts: _Parts, found: GroupScale, means: Moments | None
) -> LayerReport:
    total = float(parts.energy.sum())
    known = means is not None and total > 0
    return LayerReport(
        path=t.site.path,
        group=group.name,
        shape=t.site.shape,
        bits=t.leaf.bits,
        group_size=t.leaf.group_size,
        symmetric=t.leaf.symmetric,
        bytes_before=math.prod(t.site.shape) * np.dtype(leaf.dtype).itemsize,
        bytes_after=q.nbytes,
        error_rtn=float(parts.rtn.sum()) / total if known else None,
        error=float(parts.rounded.loss.sum()) / total if known else None,
        ratio=found.ratio,
        clipped=float(parts.rounded.clipped.mean()),
        scale="none" if found.scale is None else ("folded" if group.absorbers else "explicit"),
        reason=found.reason,
    )


def _scale_dtype(w: jax.Array, leaf: LeafConfig) -> str:
    """float16, which every runtime reads, unless the weights are too large or too small for it."""
    largest = float(jnp.abs(w).max()) * 2 / (2**leaf.bits - 1)
    return "float16" if largest == 0 or 2.0**-14 <= largest < 3e4 else "float32"


def _overflows(group: Group, targets: list[Target], leaves: Mapping[str, Any], scale: jax.Array) -> str:
    """What stays float and would become infinite in its own dtype, "" if nothing."""
    if not group.absorbers:
        return ""
    folder = fold.Folder(Plan((group,)), {group.name: scale})
    touched = dict.fromkeys([a.path for a in group.absorbers] + [s.path for s in group.sites])
    stays = [path for path in touched if path not in {t.site.path for t in targets}]
    over = (p for p in stays if not bool(jnp.isfinite(folder.leaf(p, leaves[p])).all()))
    return next((f"{p} ({leaves[p].dtype})" for p in over), "")


def _widest(dtypes: Iterable[str]) -> str:
    return "float32" if "float32" in dtypes else "float16"


def _ties_cross_experts(group: Group) -> bool:
    if group.ties is None or not group.batch:
        return False
    own = np.repeat(np.arange(math.prod(group.batch)), group.channels)
    return bool(np.any(np.asarray(group.ties) // group.channels != own))


def _padded_ties(group: Group, rows: int) -> jax.Array | None:
    """The group's ties over ``rows`` channels per expert; padding channels tie with nothing."""
    if group.ties is None:
        return None
    old = np.asarray(group.ties).reshape(-1, group.channels)
    ties = np.arange(len(old) * rows, dtype=np.int32).reshape(len(old), rows)
    ties[:, : group.channels] = old // group.channels * rows + old % group.channels
    return jnp.asarray(ties.reshape(-1))
