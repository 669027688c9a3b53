"""The weights of a group as columns side by side: corrected, and compared with what is stored."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from awq_jax.algorithm import correction
from awq_jax.algorithm.correction import Moments, Strength
from awq_jax.algorithm.grid import quantize_dequantize
from awq_jax.algorithm.solve import Blocks
from awq_jax.convert.arrays import codes
from awq_jax.devices import host
from awq_jax.devices.pool import Pool
from awq_jax.pack import Array
from awq_jax.plan import fold
from awq_jax.plan.fold import Folder
from awq_jax.plan.plan import ScaleGroup
from awq_jax.qtensor import QuantizedTensor, Weight
from awq_jax.quantizer.column_pieces import CanonicalWeight, Columns, Place, sweep
from awq_jax.quantizer.targets import Target
from awq_jax.trace.segments import Key

FEWEST = 64  # columns that are picked, if there are so many
_nearest = jax.jit(quantize_dequantize, static_argnums=(1, 2, 3, 4))


class GroupWeights:
    """The weights of a group without batch axes.

    Args:
      group: which.
      targets: its weights.
      leaves: float parameters by path.
      widths: of weights whose results are added to a stream, its channels; by the path within ``prefix``, and part.
      prefix: what paths begin with.

    Attributes:
      picked: float32 ``[K, C]``: some columns, of the first of scanned layers.
      streamed: int32 ``[C]``: which column of the streams, side by side, belongs to each of those; -1 for none.
      width: see `awq_jax.algorithm.correction.strengths`.
    """

    def __init__(
        self,
        group: ScaleGroup,
        targets: Sequence[Target],
        leaves: Mapping[str, Weight],
        widths: Mapping[Key, int],
        prefix: str,
    ) -> None:
        self._targets, self._leaves = targets, leaves
        self._weights = [CanonicalWeight.of(t, leaves[t.site.path]) for t in targets]
        self._columns = columns = Columns(self._weights, group.channels)
        offsets: dict[Key, int] = {}
        for key in widths:
            offsets[key] = sum(widths[k] for k in offsets)
        streamed = []
        for t, w in zip(targets, self._weights, strict=True):
            key = (t.site.path.removeprefix(prefix), t.site.part)
            fits = key in offsets and widths[key] == w.columns
            streamed.append(offsets[key] + np.arange(w.columns) if fits else np.full(w.columns, -1))
        which = np.concatenate(streamed).astype(np.int32)
        self._which = np.pad(which, (0, columns.pieces * columns.size - columns.total), constant_values=-1)
        sides = 2 if widths else 1
        most = min(correction.COLUMNS, max(columns.size // sides, FEWEST))
        self._some = correction.some_columns(columns.total, most)
        self.width = max(columns.size, sides * len(self._some))
        self._picked = [self._take(columns, layer) for layer in range(math.prod(group.scan))]
        self.picked, self.streamed = self._picked[0], which[self._some]
        owners = np.repeat(np.arange(len(targets)), [w.columns for w in self._weights])
        self._owners = owners[self._some]

    def corrected(self, pool: Pool, total: Moments, strength: Strength) -> dict[str, Weight]:
        """The leaves to be rounded, float32, by path."""
        columns = self._columns

        def prepare(moments: Moments) -> tuple[Moments, Blocks]:
            return moments, correction.prepare(moments)

        def run(place: Place, e: int, piece: int, given: tuple[Moments, Blocks]) -> jax.Array:
            span = slice(piece * columns.size, (piece + 1) * columns.size)
            w, which = place(columns.piece(0, 0, piece)), place(self._which[span])
            return correction.corrected(w, *given, strength, which)

        (pieces,) = sweep(pool, 1, columns.pieces, lambda e: total, prepare, run)
        whole = np.concatenate(pieces, axis=1)
        out: dict[str, Weight] = {}
        start = 0
        for t, w in zip(self._targets, self._weights, strict=True):
            before = out.get(t.site.path, self._leaves[t.site.path])
            out[t.site.path] = jax.device_put(_to_leaf(whole[:, start : start + w.columns], t, before))
            start += w.columns
        return out

    def unfolded(self, packed: Mapping[str, QuantizedTensor], folded: Folder) -> list[np.ndarray]:
        """What packed weights stand for where ``picked`` stands, without any scale that is folded in; of each layer."""
        weights = []
        for t, like in zip(self._targets, self._weights, strict=True):
            q = packed[t.site.name]
            value = _on_host(q)
            steps = folded.steps(t.site.path)
            for step in reversed(fold.steps_within(steps, t.site.part) if t.site.part else steps):
                by = np.asarray(step.values)
                if step.kind == "over":
                    value = (value + step.offset) * by - step.offset
                elif q.inv_scale is None:
                    value = value / by
            weights.append(dataclasses.replace(like, leaf=jax.device_put(value), axes=t.site.canonical_axes))
        columns = Columns(weights, self._columns.rows)
        return [self._take(columns, layer) for layer in range(len(self._picked))]

    def nearest(self) -> list[np.ndarray]:
        """What plain rounding makes of ``picked``; of each layer."""
        return [self._nearest(w) for w in self._picked]

    def _nearest(self, picked: np.ndarray) -> np.ndarray:
        out = np.empty_like(picked)
        for leaf in dict.fromkeys(t.leaf for t in self._targets):
            alike = [i for i, t in enumerate(self._targets) if t.leaf == leaf]
            # All columns, those of other weights too, filled up: a program for each number of columns would cost more.
            more = max(0, correction.COLUMNS - picked.shape[1])
            w = np.pad(picked, ((0, self._targets[alike[0]].rows - len(picked)), (0, more)))
            found = np.asarray(_nearest(w, leaf.group_size, leaf.bits, leaf.symmetric, "float32"))
            mine = np.isin(self._owners, alike)
            out[:, mine] = found[: len(out), : len(mine)][:, mine]
        return out

    def remaining(
        self, sums: Sequence[tuple[Moments, Array]], stored: Sequence[np.ndarray]
    ) -> dict[str, tuple[float, float]]:
        """By name of the weight: squared error of its results and their squares, of the picked columns of all layers.

        Args:
          sums: of each layer: `correction.remaining`'s moments and gap.
          stored: what stands for the picked columns, of each layer.
        """
        found = np.zeros((2, len(self._some)))
        for (moments, gap), w, value in zip(sums, self._picked, stored, strict=True):
            found += [np.asarray(x) for x in correction.remaining(moments, gap, w, self.streamed, value)]
        every = [found[:, self._owners == i].sum(axis=1) for i in range(len(self._targets))]
        return {t.site.name: (float(x[0]), float(x[1])) for t, x in zip(self._targets, every, strict=True)}

    def _take(self, columns: Columns, layer: int) -> np.ndarray:
        every = [columns.piece(layer, 0, i) for i in range(columns.pieces)]
        return np.concatenate([np.asarray(w) for w in every], axis=1)[:, self._some]


def _on_host(q: QuantizedTensor) -> np.ndarray:
    """What ``q``, as rounding made it, stands for, float32: by NumPy where it can see the arrays."""
    arrays = {name: getattr(q, name) for name in ("qweight", "scales", "zeros", "inv_scale")}
    seen = {name: host.view(a) for name, a in arrays.items() if a is not None}
    if any(a is None for a in seen.values()):
        return np.asarray(dequantized(q, "float32"))
    lead = q.scales.shape[:-2]
    each = []
    for i in np.ndindex(*lead):
        tables: dict[str, Any] = {name: a[i] for name, a in seen.items() if a is not None}
        each.append(codes.dequantize(dataclasses.replace(q, **tables)))
    order = [d for role in "bkn" for d, a in enumerate(q.live_axes) if a == role]
    whole = np.stack(each).reshape(*lead, *q.k_dims, *q.n_dims)
    return whole.transpose(np.argsort(order))


@functools.partial(jax.jit, static_argnames="dtype")
def dequantized(q: QuantizedTensor, dtype: str) -> jax.Array:
    """`QuantizedTensor.dequantize`, compiled."""
    return q.dequantize(dtype)


def _to_leaf(w: np.ndarray, t: Target, leaf: Weight) -> np.ndarray:
    """``[K, N]`` as the leaf has it, float32; of a part of a leaf, the leaf with that part replaced."""
    site = t.site
    order = [d for r in "bkn" for d, a in enumerate(site.canonical_axes) if a == r]
    # Batch axes without an activation of their own are among the columns.
    stored = [site.part_shape[d] for d in order]
    b = sum(a == "b" for a in site.canonical_axes)
    k = sum(a == "k" for a in site.canonical_axes)
    rows_first = w.reshape(*stored[b : b + k], *stored[:b], *stored[b + k :])
    part = np.moveaxis(rows_first, range(k, k + b), range(b))
    part = np.transpose(part, np.argsort(order))
    if not site.part:
        return np.ascontiguousarray(part)
    assert not isinstance(leaf, QuantizedTensor)
    out = np.array(leaf, np.float32)
    out[site.window] = part
    return out
