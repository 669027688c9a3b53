"""Which scale channel each element of a value carries, pushed from a value back to its operands.

A label array has the rank of its value; an axis along which labels do not vary has size 1, so
labels of a whole model fit in little memory. A label is a channel number, `UNIT` (the element must
stay as it is) or `UNREAD` (nothing that was followed reads it).
"""

import math
from collections.abc import Collection, Iterator

import numpy as np

from awq_jax.trace import views
from awq_jax.trace.jaxpr import Val
from awq_jax.trace.rearranged import SAME_SHAPE
from awq_jax.trace.scopes import Node
from awq_jax.trace.views import View

UNIT, UNREAD = -1, -2

# f(s * x) = s * f(x) for every s > 0, element by element.
HOMOGENEOUS = SAME_SHAPE | {"neg", "abs", "psum", "psum_invariant"}
WRITES = frozenset(("dynamic_update_slice", "scatter", "scatter-add"))


class Blocked(Exception):
    """The scale cannot pass; the message says why."""


class SharedChannels:
    """Channels that must share one scale (union-find)."""

    def __init__(self, n: int):
        self.parent = np.arange(n, dtype=np.int32)

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = int(self.parent[i])
        return i

    def join(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Elementwise: the known label of two, which share a scale from now on where both are channels."""
        a, b = np.broadcast_arrays(a, b)
        both = np.minimum(a, b)
        out = np.maximum(a, b)
        if np.any((out >= 0) & (both == UNIT)):
            raise Blocked("one part of a value would be scaled and another not")
        differ = (both >= 0) & (a != b)
        if differ.any():
            for i, j in np.unique(np.stack([a[differ], b[differ]]), axis=1).T.tolist():
                i, j = self.find(i), self.find(j)
                self.parent[max(i, j)] = min(i, j)
        return out

    def along(self, lab: np.ndarray, axis: int) -> np.ndarray:
        """One label for all elements along ``axis`` (kept, with size 1)."""
        if lab.shape[axis] == 1:
            return lab
        one = lab.max(axis=axis, keepdims=True)
        self.join(lab, one)
        return one

    def groups(self) -> np.ndarray:
        """int32 ``[n]``: the smallest channel that each shares its scale with."""
        return np.array([self.find(i) for i in range(len(self.parent))], np.int32)


def fit(lab: np.ndarray, shape: tuple[int, ...], shared: SharedChannels) -> np.ndarray:
    """Labels for an operand of ``shape`` that was broadcast to the labelled value."""
    if shape == () and lab.ndim:
        lab = lab.reshape(-1)
        return shared.along(lab, 0).reshape(())
    for d, (a, b) in enumerate(zip(lab.shape, shape, strict=True)):
        if a != b and b == 1:
            lab = shared.along(lab, d)
    return lab


def reshape(lab: np.ndarray, new: tuple[int, ...], old: tuple[int, ...]) -> np.ndarray:
    """Labels of a value of shape ``new`` as labels of the ``old`` value it was reshaped from."""
    out: list[int] = []
    full: list[int] = []
    i = j = 0
    while i < len(new) or j < len(old):
        a, b = [i], [j]
        i, j = i + 1, j + 1
        pa = math.prod(new[a[0] : i])
        pb = math.prod(old[b[0] : j])
        while pa != pb:
            if pa < pb:
                pa *= new[i]
                i += 1
            else:
                pb *= old[j]
                j += 1
        i, j = min(i, len(new)), min(j, len(old))
        block = lab.shape[a[0] : i]
        if all(n == 1 for n in block):
            full += block
            out += [1] * (j - b[0])
        else:
            full += new[a[0] : i]
            out += old[b[0] : j]
    if math.prod(full) > 1 << 26:
        raise Blocked("a reshape mixes channels with positions")
    return np.broadcast_to(lab, full).reshape(out)


def site_labels(node: Node) -> np.ndarray:
    """Channel numbers, flat over ``[*batch, K]`` in the order of the leaf, on the site's activation."""
    op = node.op
    assert op.roles is not None
    contract, batch = op.dims
    pos = 0 if op.grouped is not None else op.x
    shape = node.x.shape
    b, c = tuple(batch[pos]), tuple(contract[pos])
    parts = (op.roles.b, op.roles.k)
    if op.use is not None and op.use.experts is not None:  # the channels of each row's expert
        parts, b = ((), op.roles.k), ()
    orders = [views.leaf_order(p) for p in parts]
    stored = [p[i].size for p, order in zip(parts, orders, strict=True) for i in order]
    ids = np.arange(int(np.prod(stored)), dtype=np.int32).reshape(stored)
    nb = len(orders[0])
    perm = [*np.argsort(orders[0]).tolist(), *(nb + int(i) for i in np.argsort(orders[1]))]
    ids = np.transpose(ids, perm).reshape([shape[d] for d in (*b, *c)])
    ids = np.transpose(ids, np.argsort((*b, *c)).tolist())
    return ids.reshape([n if d in b or d in c else 1 for d, n in enumerate(shape)])


def in_leaf_order(view: View, lab: np.ndarray) -> np.ndarray:
    """Labels of a view as those of the leaf without its scanned axes; `UNIT` outside of the view's part."""
    sizes: list[int] = []
    for n, axis in zip(lab.shape, view.axes, strict=True):
        if n > 1 and any(f.axis == views.POSITION for f in axis):
            raise Blocked("a scale would depend on the position")
        sizes += [f.size if n > 1 else 1 for f in axis if f.axis != views.POSITION]
    factors = [f for axis in view.axes for f in axis if f.axis != views.POSITION]
    order = views.leaf_order(tuple(factors))
    lab = np.transpose(lab.reshape(sizes), order)
    shape: list[int] = []  # of the part, axis by axis of the leaf
    wide: list[int] = []  # of the factors, each axis of the leaf either varied over or not
    for d in range(len(view.shape)):
        mine = [i for i, k in enumerate(order) if factors[k].axis == d]
        varied = any(lab.shape[i] > 1 for i in mine)
        wide += [factors[order[i]].size if varied else 1 for i in mine]
        if d not in view.scanned:
            shape.append(math.prod(factors[order[i]].size for i in mine) if varied else 1)
    lab = np.broadcast_to(lab, wide).reshape(shape)
    live = [d for d in range(len(view.shape)) if d not in view.scanned]
    cut = [view.extent(d) != (0, view.shape[d]) for d in live]
    if any(cut):
        out = np.full([view.shape[d] if c else n for d, n, c in zip(live, shape, cut, strict=True)], UNIT, np.int32)
        spans = (view.extent(d) for d in live)
        out[tuple(slice(a, a + n) if c else slice(None) for (a, n), c in zip(spans, cut, strict=True))] = lab
        return out
    return lab


def _window(lab: np.ndarray, shape: tuple[int, ...], where: tuple[slice, ...]) -> np.ndarray:
    """Labels of a value of which only ``where`` is read."""
    whole = [w.indices(s) == (0, s, 1) for w, s in zip(where, shape, strict=True)]
    size = [1 if n == 1 and all_read else s for n, s, all_read in zip(lab.shape, shape, whole, strict=True)]
    out = np.full(size, UNREAD, np.int32)
    out[tuple(slice(None) if n == 1 else w for n, w in zip(size, where, strict=True))] = lab
    return out


def with_unread(lab: np.ndarray) -> np.ndarray:
    """Labels of what is read along the whole of each axis, where they are the same along it."""
    for d in range(lab.ndim):
        one = lab.max(axis=d, keepdims=True)
        if ((lab == one) | (lab == UNREAD)).all():
            lab = one
    return lab


def window_of(node: Node, k: int) -> tuple[slice, ...] | None:
    """What result ``k`` of a slice, split or unstack reads of its operand; None for other operations."""
    p = node.params
    if node.name == "slice":
        steps = p["strides"] or (1,) * len(p["start_indices"])
        return tuple(slice(*t) for t in zip(p["start_indices"], p["limit_indices"], steps, strict=True))
    if node.name == "split":
        start = sum(p["sizes"][:k])
        where = [slice(None)] * len(node.ins[0].shape)
        where[p["axis"]] = slice(start, start + p["sizes"][k])
        return tuple(where)
    if node.name == "unstack":
        return tuple(slice(k, k + 1) if d == p["axis"] else slice(None) for d in range(len(node.ins[0].shape)))
    return None


def back(
    node: Node, k: int, lab: np.ndarray, shared: SharedChannels, zeros: Collection[int] = ()
) -> Iterator[tuple[int, np.ndarray]]:
    """Labels the operands need so that result ``k`` of a linear operation carries ``lab``.

    Yields ``(operand position, labels)``. Products, where one operand must be chosen, are
    `through_product`'s. ``zeros``: positions of operands that are zero, which carry any scale.

    Raises:
      Blocked: if the operation is not linear, or its labels do not fit.
    """
    p, name = node.params, node.name
    shape = np.shape(node.ins[0]) if node.ins else ()
    if name in HOMOGENEOUS:
        yield (k if len(node.ins) == len(node.outs) else 0), lab
    elif name == "transpose":
        yield 0, np.transpose(lab, np.argsort(p["permutation"]).tolist())
    elif name == "reshape" and p.get("dimensions") is None:
        yield 0, reshape(lab, node.outs[0].shape, shape)
    elif name == "squeeze":
        yield 0, np.expand_dims(lab, tuple(p["dimensions"]))
    elif name == "broadcast_in_dim":
        dims = p["broadcast_dimensions"]
        for d in range(lab.ndim):
            if d not in dims or shape[dims.index(d)] == 1:
                lab = shared.along(lab, d)
        order = [*dims, *(d for d in range(lab.ndim) if d not in dims)]
        yield 0, np.transpose(lab, order).reshape([lab.shape[d] for d in dims])
    elif name in ("slice", "split", "unstack"):
        where = window_of(node, k)
        lab = np.expand_dims(lab, p["axis"]) if name == "unstack" else lab
        assert where is not None
        yield 0, _window(lab, shape, where)
    elif name == "rev":
        yield 0, np.flip(lab, p["dimensions"])
    elif name in ("add", "sub", "add_any", "max"):  # max(s*a, s*b) = s*max(a, b)
        for pos, v in enumerate(node.ins):
            if pos not in zeros:
                yield pos, fit(lab, v.shape, shared) if isinstance(v, Val) else lab
    elif name == "select_n":
        for pos in range(1, len(node.ins)):
            yield pos, lab
    elif name == "reduce_sum":
        yield 0, np.expand_dims(lab, tuple(p["axes"]))
    elif name == "concatenate":
        d, start = p["dimension"], 0
        for pos, v in enumerate(node.ins):
            n = v.shape[d]
            part = lab if lab.shape[d] == 1 else np.take(lab, np.arange(start, start + n), axis=d)
            yield pos, part
            start += n
    elif name == "stack":
        for pos in range(len(node.ins)):
            at = min(pos, lab.shape[p["axis"]] - 1)
            yield pos, np.take(lab, at, axis=p["axis"])
    elif name == "tile":
        lead = len(p["reps"]) - len(shape)
        for d, n in enumerate(p["reps"]):
            if n > 1 and lab.shape[d] > 1:
                size = lab.shape[d] // n
                lab = lab.reshape(*lab.shape[:d], n, size, *lab.shape[d + 1 :])
                lab = shared.along(lab, d).reshape(*lab.shape[:d], size, *lab.shape[d + 2 :])
        yield 0, lab.reshape(lab.shape[lead:])
    elif name == "pad":
        if any(lo < 0 or inner for lo, _, inner in p["padding_config"]):
            raise Blocked("it passes through an uneven pad")
        inside = tuple(
            slice(None) if a == 1 else slice(lo, lo + n)
            for a, n, (lo, _, _) in zip(lab.shape, shape, p["padding_config"], strict=True)
        )
        yield 0, lab[inside]
        yield 1, fit(lab, (), shared) if isinstance(node.ins[1], Val) else lab
    elif name in ("gather", "dynamic_slice"):
        yield 0, _gathered(node, lab, shape, shared)
    elif name in WRITES:
        yield 0, lab
        yield (1 if name == "dynamic_update_slice" else 2), _written(node, lab)
    else:
        raise Blocked(f"it passes through {node.op.describe()}, which a scale per channel cannot cross")


def _gathered(node: Node, lab: np.ndarray, shape: tuple[int, ...], shared: SharedChannels) -> np.ndarray:
    """Whole rows picked by index: labels may vary along axes that are read in full only."""
    if node.name == "dynamic_slice":
        axis_of = dict(enumerate(range(len(shape))))
        whole = [a == b for a, b in zip(node.outs[0].shape, shape, strict=True)]
    else:
        d = node.params["dimension_numbers"]
        gone = {*d.collapsed_slice_dims, *d.operand_batching_dims}
        axis_of = dict(zip((i for i in range(len(shape)) if i not in gone), d.offset_dims, strict=True))
        whole = [i in axis_of and node.params["slice_sizes"][i] == n for i, n in enumerate(shape)]
        for axis in range(lab.ndim):
            if axis not in d.offset_dims:
                lab = shared.along(lab, axis)
    if any(lab.shape[a] != 1 and not whole[i] for i, a in axis_of.items()):
        raise Blocked(f"{node.op.describe()} picks channels by index")
    kept = {i: lab.shape[a] for i, a in axis_of.items()}
    return lab.reshape([kept.get(i, 1) for i in range(len(shape))])


def _written(node: Node, lab: np.ndarray) -> np.ndarray:
    """Whole rows put into another array by index, as into a cache: labels may vary along axes that are full only."""
    into = node.ins[0].shape
    if node.name == "dynamic_update_slice":
        rows, axis_of = node.ins[1].shape, {d: d for d in range(len(into))}
    else:
        rows, d = node.ins[2].shape, node.params["dimension_numbers"]
        gone = {*d.inserted_window_dims, *d.operand_batching_dims}
        kept = (i for i in range(len(into)) if i not in gone)
        axis_of = dict(zip(kept, d.update_window_dims, strict=True))
    if any(n != 1 and (i not in axis_of or rows[axis_of[i]] != into[i]) for i, n in enumerate(lab.shape)):
        raise Blocked(f"{node.op.describe()} writes channels by index")
    sizes = [1] * len(rows)
    for i, a in axis_of.items():
        sizes[a] = lab.shape[i]
    return lab.reshape(sizes)


def through_product(node: Node, pos: int, lab: np.ndarray, shared: SharedChannels) -> np.ndarray:
    """Labels for operand ``pos`` of a product (mul, div, dot_general) that carries the whole scale."""
    shape = node.ins[pos].shape
    if node.name != "dot_general":
        return fit(lab, shape, shared)
    contract, batch = node.params["dimension_numbers"]
    c, b = tuple(contract[pos]), tuple(batch[pos])
    nb = len(b)
    left = len(node.ins[0].shape) - len(contract[0]) - nb
    others = range(nb + left, lab.ndim) if pos == 0 else range(nb, nb + left)
    for d in others:
        lab = shared.along(lab, d)
    free = [d for d in range(len(shape)) if d not in c and d not in b]
    mine = [n for d, n in enumerate(lab.shape) if d not in others]
    order = [*b, *free, *c]
    return np.transpose(lab.reshape([*mine, *[1] * len(c)]), np.argsort(order).tolist())


def is_zero(literal: object) -> bool:
    """A constant that any scale leaves alone."""
    try:
        return not np.any(np.asarray(literal))
    except Exception:  # a tracer: its value is unknown here
        return False
