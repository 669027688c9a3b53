"""One scale group at a time: from leaves and statistics to a scale, and to packed weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax import fold, pack
from awq_jax.calibration import Stats
from awq_jax.config import AwqConfig, LeafConfig
from awq_jax.errors import CalibrationError
from awq_jax.matrix import Rounded, round_matrix
from awq_jax.plan import Group
from awq_jax.qtensor import QuantizedTensor, split_shape, to_canonical
from awq_jax.report import LayerReport
from awq_jax.rounding import column_loss, quantize_dequantize
from awq_jax.scale import search
from awq_jax.select import Target

MIN_TOKENS = 64  # an expert that saw fewer takes the layer's statistics


@dataclasses.dataclass(frozen=True)
class GroupScale:
    """What the search decided for one group.

    Attributes:
      scale: float32 ``[*scan, *batch, K]``, or None for 1 everywhere.
      ratio: mean exponent chosen, None if 1.
      reason: why there is no scale, "" if there is one.
    """

    scale: jax.Array | None
    ratio: float | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class _Moments:
    """Statistics of one group as ``[S, E, ...]`` (S scanned layers, E experts or 1)."""

    gram: jax.Array
    absmean: jax.Array
    ok: bool
    note: str


def find_scale(
    group: Group, targets: list[Target], leaves: Mapping[str, Any], stats: Stats | None, config: AwqConfig
) -> GroupScale:
    """Search the scale of ``group``, or say why it stays 1.

    Raises:
      CalibrationError: the method needs statistics and there are none for this group.
    """
    if config.method == "rtn":
        return GroupScale(None, reason="round to nearest")
    if stats is None:
        raise CalibrationError(
            f"no statistics for {group.name}: calibrate with include_head=True, or skip it, or use the plan it was made for"
        )
    if not group.absorbers and not config.explicit_scale:
        return GroupScale(None, reason=group.reason or "no parameter can absorb the scale")
    moments = _moments(group, stats)
    if not moments.ok:
        return GroupScale(None, reason=moments.note)
    lead = (*group.scan, *group.batch)
    weights = [_canonical(leaves[t.site.path], t, group) for t in targets]
    rows = _common_rows(targets)
    configs = tuple(t.leaf for t in targets)
    ties = None if group.ties is None else jnp.asarray(group.ties)
    experts = math.prod(group.batch)
    joint = bool(
        group.ties is not None
        and experts > 1
        and np.any(group.ties // group.channels != np.repeat(np.arange(experts), group.channels))
    )
    if ties is not None and rows != group.channels:
        extra = rows - group.channels
        # Padding rows: number them apart so that they tie with nothing.
        grid = np.full((experts, rows), 0, np.int32)
        old = np.asarray(group.ties).reshape(experts, group.channels)
        grid[:, : group.channels] = old // group.channels * rows + old % group.channels
        grid[:, group.channels :] = np.arange(experts)[:, None] * rows + group.channels + np.arange(extra)
        ties = jnp.asarray(grid.reshape(-1))
    found = [
        _search(
            tuple(_pad_rows(w[i], rows) for w in weights),
            _pad_square(moments.gram[i], rows),
            jnp.pad(moments.absmean[i], ((0, 0), (0, rows - group.channels))),
            ties,
            leaves=configs,
            n_grid=config.n_grid,
            joint=joint,
            dtype="float16",
        )
        for i in range(math.prod(group.scan))
    ]
    ratios = np.concatenate([np.asarray(f.ratio) for f in found])
    if np.isnan(ratios).all():
        return GroupScale(None, reason="no scale beat plain rounding")
    scale = jnp.stack([f.scale[:, : group.channels] for f in found]).reshape(*lead, group.channels)
    return GroupScale(scale, float(np.nanmean(ratios)), moments.note)


def round_group(
    group: Group,
    targets: list[Target],
    leaves: Mapping[str, Any],
    folded: fold.Folder,
    found: GroupScale,
    stats: Stats | None,
    config: AwqConfig,
) -> dict[str, tuple[QuantizedTensor, LayerReport]]:
    """Round and pack the targets of one group; those stored alike are rounded as one matrix."""
    if stats is None and config.method != "rtn":
        raise CalibrationError(f"no statistics for {group.name}: calibrate again with the plan in use")
    moments = _moments(group, stats) if stats is not None else None
    if moments is not None and not moments.ok:
        moments = None
    out: dict[str, tuple[QuantizedTensor, LayerReport]] = {}
    by_leaf: dict[LeafConfig, list[Target]] = {}
    for t in targets:
        by_leaf.setdefault(t.leaf, []).append(t)
    for leaf, alike in by_leaf.items():
        weights = [_canonical(folded.leaf(t.site.path, leaves[t.site.path]), t, group) for t in alike]
        widths = [w.shape[-1] for w in weights]
        whole = jnp.concatenate(weights, axis=-1)
        dtype = _scale_dtype(whole, leaf)
        rows = alike[0].rows
        scale = (
            jnp.ones((*whole.shape[:2], group.channels))
            if found.scale is None
            else found.scale.reshape(*whole.shape[:2], -1)
        )
        parts = [
            _round(
                _pad_rows(whole[i], rows),
                None if moments is None else _pad_square(moments.gram[i], rows),
                jnp.pad(scale[i], ((0, 0), (0, rows - group.channels)), constant_values=1.0),
                leaf=leaf,
                method=config.method,
                clip=config.clip,
                damping=config.damping,
                dtype=dtype,
            )
            for i in range(whole.shape[0])
        ]
        rounded, energy, rtn = jax.tree.map(lambda *xs: jnp.stack(xs), *parts)
        start = 0
        for t, width in zip(alike, widths, strict=True):
            cut = slice(start, start + width)
            start += width
            q = _pack(t, group, leaves[t.site.path], rounded, cut, found, dtype)
            out[t.site.path] = (
                q,
                _row(t, group, leaves[t.site.path], q, rounded, energy, rtn, cut, found, moments is not None),
            )
    return out


@functools.partial(jax.jit, static_argnames=("leaves", "n_grid", "joint", "dtype"))
def _search(weights, gram, absmean, ties, *, leaves, n_grid, joint, dtype):  # type: ignore[no-untyped-def]
    return search(weights, gram, absmean, ties, leaves=leaves, n_grid=n_grid, joint=joint, dtype=dtype)


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
) -> tuple[Rounded, jax.Array, jax.Array]:
    """``w [E, K, N]`` (scaled) to (`Rounded`, output energy ``[E, N]``, plain rounding's loss ``[E, N]``)."""

    def one(args: tuple[jax.Array, jax.Array | None, jax.Array]) -> tuple[Rounded, jax.Array, jax.Array]:
        w, h, s = args
        if h is None:
            r = round_matrix(w, None, leaf=leaf, compensated=False, clip=False, damping=damping, dtype=dtype)
            return r, r.loss, r.loss
        scaled = h / (s[:, None] * s[None, :])
        plain = w / s[:, None]
        rtn = column_loss(quantize_dequantize(plain, leaf.group_size, leaf.bits, leaf.symmetric, dtype) - plain, h)
        if method == "rtn":
            r = round_matrix(w, None, leaf=leaf, compensated=False, clip=False, damping=damping, dtype=dtype)
            r = r._replace(loss=rtn)
        else:
            r = round_matrix(
                w, scaled, leaf=leaf, compensated=method == "awq+gptq", clip=clip, damping=damping, dtype=dtype
            )
        return r, column_loss(w, scaled), rtn

    return jax.lax.map(one, (w, gram, scale))


def _moments(group: Group, stats: Stats) -> _Moments:
    """Means from sums; experts seen too rarely take the layer's, empty layers are not ok."""
    s, e, k = math.prod(group.scan), math.prod(group.batch), group.channels
    gram = jnp.asarray(stats.gram).reshape(s, e, k, k)
    total = jnp.asarray(stats.abs).reshape(s, e, k)
    count = np.asarray(stats.count).reshape(s, e)
    if (count.sum(axis=1) == 0).any() or not bool(jnp.isfinite(gram).all()):
        return _Moments(gram, total, False, "no finite activations were seen in calibration")
    note = ""
    if e > 1 and (count < MIN_TOKENS).any():
        few = count < MIN_TOKENS
        note = f"experts {sorted(set(np.nonzero(few)[1].tolist()))} saw under {MIN_TOKENS} tokens: the layer's statistics were used"
        pick = jnp.asarray(few)
        gram = jnp.where(pick[..., None, None], gram.sum(axis=1, keepdims=True), gram)
        total = jnp.where(pick[..., None], total.sum(axis=1, keepdims=True), total)
        count = np.where(few, count.sum(axis=1, keepdims=True), count)
    n = jnp.asarray(count)
    return _Moments(gram / n[..., None, None], total / n[..., None], True, note)


def _canonical(leaf: Any, target: Target, group: Group) -> jax.Array:
    """Float leaf to ``[S, E, K, N]``; experts that share one activation become more columns."""
    w = to_canonical(jnp.asarray(leaf).astype(jnp.float32), target.site.canonical_axes)
    k, n = w.shape[-2:]
    s = math.prod(group.scan)
    if group.batch:
        return w.reshape(s, math.prod(group.batch), k, n)
    return jnp.moveaxis(w.reshape(s, -1, k, n), 1, 2).reshape(s, 1, k, -1)


def _uncanonical(a: jax.Array, target: Target, group: Group) -> jax.Array:
    """``[S, E, R, N]`` (R rows of codes, scales or zeros) back to ``[*batch axes of the leaf, R, N]``."""
    batch, _, n_dims = split_shape(target.site.shape, target.site.canonical_axes)
    n = math.prod(n_dims)
    rows = a.shape[2]
    if group.batch:
        return a.reshape(*batch, rows, n)
    own = math.prod(batch) // math.prod(group.scan)
    return jnp.moveaxis(a.reshape(a.shape[0], rows, own, n), 2, 1).reshape(*batch, rows, n)


def _pack(
    t: Target, group: Group, leaf: Any, rounded: Rounded, cut: slice, found: GroupScale, dtype: str
) -> QuantizedTensor:
    batch, k_dims, n_dims = split_shape(t.site.shape, t.site.canonical_axes)
    inverse = None
    if found.scale is not None and not group.absorbers:
        lead = (*group.scan, *group.batch)
        missing = len(batch) - len(lead)
        inverse = jnp.broadcast_to(
            (1.0 / found.scale).reshape(*lead, *(1,) * missing, group.channels), (*batch, group.channels)
        )
    return QuantizedTensor(
        qweight=pack.pack(_uncanonical(rounded.codes[..., cut], t, group), t.leaf.bits),
        scales=_uncanonical(rounded.scale[..., cut], t, group).astype(dtype),
        zeros=None if t.leaf.symmetric else _uncanonical(rounded.zero[..., cut], t, group),
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
    group: Group,
    leaf: Any,
    q: QuantizedTensor,
    rounded: Rounded,
    energy: jax.Array,
    rtn: jax.Array,
    cut: slice,
    found: GroupScale,
    measured: bool,
) -> LayerReport:
    total = float(energy[..., cut].sum())
    known = measured and total > 0
    kind = "none" if found.scale is None else ("folded" if group.absorbers else "explicit")
    return LayerReport(
        path=t.site.path,
        group=group.name,
        shape=t.site.shape,
        bits=t.leaf.bits,
        group_size=t.leaf.group_size,
        symmetric=t.leaf.symmetric,
        bytes_before=math.prod(t.site.shape) * np.dtype(leaf.dtype).itemsize,
        bytes_after=q.nbytes,
        error_rtn=float(rtn[..., cut].sum()) / total if known else None,
        error=float(rounded.loss[..., cut].sum()) / total if known else None,
        ratio=found.ratio,
        clipped=float(rounded.clipped.mean()),
        scale=kind,
        reason=found.reason,
    )


def _scale_dtype(whole: jax.Array, leaf: LeafConfig) -> str:
    """float16, which every runtime reads, unless the weights are too large or too small for it."""
    largest = float(jnp.abs(whole).max()) * 2 / (2**leaf.bits - 1)
    return "float16" if largest == 0 or 2.0**-14 <= largest < 3e4 else "float32"


def _common_rows(targets: list[Target]) -> int:
    """Fewest rows that every target's group size divides."""
    step = math.lcm(*(t.leaf.group_size for t in targets))
    return -(-targets[0].k // step) * step


def _pad_rows(w: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(w, [(0, 0)] * (w.ndim - 2) + [(0, rows - w.shape[-2]), (0, 0)])


def _pad_square(gram: jax.Array, rows: int) -> jax.Array:
    extra = rows - gram.shape[-1]
    return jnp.pad(gram, [(0, 0)] * (gram.ndim - 2) + [(0, extra), (0, extra)])
