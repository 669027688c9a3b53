"""Fold scales into parameters: weights times s, what produces their input divided by s.

``x W = (x / s)(diag(s) W)`` for the input x of a matmul (arXiv 2306.00978, section 3.2). Dividing x costs nothing at
run time where what makes x is linear in a parameter, channel by channel: a norm's weight g in ``x = g * n``; the rows
of an up projection in ``x = silu(gate) * up``; the columns of a value projection.

The last one crosses attention. Query head h reads value head ``v(h)``, and channel c of it enters the output
projection as ``x[h, c] = sum_t p[h, t] V[t, v(h), c]``: linear in V, and the probabilities p know nothing of c. So a
scale on ``(h, c)`` divides column ``(v(h), c)`` of the value projection and its bias. With grouped queries several h
have one ``v(h)``, hence one s for all ``(h, c)`` of one ``(v(h), c)``: shared channels
(`ScaleGroup.shared_channels`), and ``Absorber.index`` names for each column of V a channel whose scale divides it.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import ModuleType
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax import paths
from awq_jax.devices import host
from awq_jax.errors import PlanError, ShapeError, WeightError
from awq_jax.pack import Array
from awq_jax.plan.plan import Absorber, Plan, ScaleGroup, Site
from awq_jax.qtensor import QuantizedTensor, Weight
from awq_jax.trace.views import Window

Scales = Mapping[str, Array]
T = TypeVar("T")
A = TypeVar("A", jax.Array, np.ndarray)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["kind", "offset"])
@dataclasses.dataclass(frozen=True)
class ScaleStep:
    """One step of folding a scale into a parameter.

    Attributes:
      kind: ``"times"`` or ``"over"``.
      offset: of a parameter that is used as ``offset + parameter``; the sum is divided.
      values: float, broadcast against the parameter.
    """

    kind: str
    offset: float
    values: Array

    def apply(self, w: A) -> A:
        """``w`` multiplied or divided."""
        if self.kind == "times":
            return cast(A, w * self.values.astype(w.dtype))
        return cast(A, (self.offset + w) / self.values.astype(w.dtype) - self.offset)


class Folder:
    """Applies the scales of a plan one parameter at a time, so that memory stays at one leaf.

    Args:
      plan: scale groups.
      scales: group name -> ``s [*scan, *batch, K]``, positive; groups that are absent stay as they are, but for those
        that follow one which absorbs its scale.

    Raises:
      PlanError: a name is not a group of the plan.
      ShapeError: a scale does not have its group's shape.
    """

    def __init__(self, plan: Plan, scales: Scales):
        groups = {g.name: g for g in plan.groups}
        self._scales = scales = {**scales, **_followed(groups, scales)}
        self._sites: dict[str, list[tuple[ScaleGroup, Site]]] = {}
        self._absorbers: dict[str, list[tuple[ScaleGroup, Absorber]]] = {}
        for name, s in scales.items():
            if name not in groups:
                raise PlanError(f"scale for {name}: the plan has no such group")
            g = groups[name]
            if tuple(jnp.shape(s)) != (*g.scan, *g.batch, g.channels):
                raise ShapeError(f"scale of {name}: shape {jnp.shape(s)}, expected {(*g.scan, *g.batch, g.channels)}")
            for site in g.sites:
                self._sites.setdefault(site.path, []).append((g, site))
            for a in g.absorbers:
                self._absorbers.setdefault(a.path, []).append((g, a))

    def leaf(self, path: str, leaf: Weight) -> Weight:
        """The parameter with its scales folded in: same shape and dtype, computed in float32 or wider.

        Raises:
          WeightError: the parameter is packed already.
        """
        steps = self.steps(path)
        if not steps:
            return leaf
        if isinstance(leaf, QuantizedTensor):
            raise WeightError(f"{path} is packed: scales fold into float parameters only")
        here = host.view(leaf)
        alike = None if here is None else steps_on_host(steps, here.shape)
        if here is None or alike is None:
            return _folded(leaf, steps)
        with np.errstate(over="ignore"):  # a caller that minds looks at the result
            wide = scaled(here.astype(np.promote_types(here.dtype, np.float32)), alike)
            return jax.device_put(wide.astype(here.dtype))

    def steps(self, path: str) -> tuple[ScaleStep, ...]:
        """What `leaf` does with a parameter: divide where it absorbs a scale, multiply where it is a site's weight."""
        divide, multiply = self._absorbers.get(path, []), self._sites.get(path, [])
        return (
            *(ScaleStep("over", a.offset, absorber_scale(g, a, self._scales[g.name])) for g, a in divide),
            *(ScaleStep("times", 0.0, site_scale(g, site, self._scales[g.name])) for g, site in multiply),
        )


def followed(group: ScaleGroup, s: Array) -> Array:
    """The scale of a group that follows another, whose scale is ``s``: ``[*scan, *batch, K]``."""
    assert group.follows is not None
    flat = s.reshape(*group.scan, -1)
    return flat[..., np.asarray(group.follows.index)].reshape(*group.scan, *group.batch, group.channels)


def _followed(groups: Mapping[str, ScaleGroup], scales: Scales) -> Scales:
    """The scales of all groups that follow one which absorbs its own."""
    leads = {name for name in scales if name in groups and groups[name].absorbers}
    return {
        name: followed(g, scales[g.follows.group])
        for name, g in groups.items()
        if g.follows is not None and g.follows.group in leads
    }


def scaled(w: A, steps: tuple[ScaleStep, ...]) -> A:
    """``w``, in the dtype to compute in, with all steps applied."""
    for step in steps:
        w = step.apply(w)
    return w


def steps_on_host(steps: tuple[ScaleStep, ...], shape: tuple[int, ...]) -> tuple[ScaleStep, ...] | None:
    """``steps`` of a leaf of ``shape`` with which NumPy makes the bits that XLA makes on a CPU of the given ones.

    XLA divides by a broadcast as it multiplies by its reciprocal. None: values are elsewhere, or there is an offset
    too, which it subtracts before it rounds.
    """
    out = []
    for step in steps:
        values = host.view(step.values)
        if values is None:
            return None
        if step.kind == "over" and values.shape != shape:
            if step.offset:
                return None
            step = ScaleStep("times", 0.0, np.float32(1.0) / values)
        out.append(dataclasses.replace(step, values=np.asarray(step.values)))
    return tuple(out)


def steps_within(steps: tuple[ScaleStep, ...], part: Window) -> tuple[ScaleStep, ...]:
    """``steps`` for a part of the parameter; those that leave it alone are gone."""
    out = []
    for step in steps:
        at = (slice(a, a + n) if m > 1 else slice(None) for (a, n), m in zip(part, step.values.shape, strict=True))
        values = step.values[tuple(at)]
        if not isinstance(values, np.ndarray) or not (values == 1).all():
            out.append(dataclasses.replace(step, values=values))
    return tuple(out)


@jax.jit
def _folded(leaf: jax.Array, steps: tuple[ScaleStep, ...]) -> jax.Array:
    return scaled(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), steps).astype(leaf.dtype)


def site_scale(group: ScaleGroup, site: Site, s: Array) -> Array:
    """``s [*scan, *batch, K]`` laid out to multiply the leaf of ``site``; 1 outside of the site's part."""
    xp = _module(s)
    own = site.batch_axes if group.batch else ()
    sizes = [1 if a == "b" and d not in own else site.part_shape[d] for d, a in enumerate(site.axes)]
    stored = [*site.scan_axes, *(d for r in "bk" for d, a in enumerate(site.axes) if a == r)]
    # s is stored scan, batch, k; the leaf may interleave them with output axes.
    s = xp.transpose(s.reshape([sizes[d] for d in stored]), np.argsort(stored).tolist())
    it = iter(s.shape)
    s = s.reshape([1 if a == "n" else next(it) for a in site.axes])
    if not site.part:
        return s
    whole = [(0, n) == w for n, w in zip(site.shape, site.part, strict=True)]
    out = xp.ones([m if w else n for w, m, n in zip(whole, s.shape, site.shape, strict=True)], s.dtype)
    window = tuple(slice(None) if w else span for w, span in zip(whole, site.window, strict=True))
    if xp is np:
        out[window] = s
        return out
    return out.at[window].set(s)


def absorber_scale(group: ScaleGroup, absorber: Absorber, s: Array) -> Array:
    """``s [*scan, *batch, K]`` laid out to divide the absorbing parameter; 1 where it is left alone."""
    xp = _module(s)
    s = s.reshape(*group.scan, math.prod(group.batch) * group.channels)
    index = np.asarray(absorber.index)
    values = xp.where(index >= 0, s[..., np.maximum(index, 0)], xp.ones((), s.dtype))
    lead = len(group.scan)
    return xp.moveaxis(values, tuple(range(lead)), absorber.scan_axes(lead)) if lead else values


def _module(s: Array) -> ModuleType:
    """What computes with ``s``: NumPy where that holds it, without compiling anything."""
    return np if isinstance(s, np.ndarray) else jnp


def apply(plan: Plan, params: T, scales: Scales) -> T:
    """``params`` with the scales folded in: the model computes the same function as before.

    Args:
      plan: scale groups.
      params: float parameters.
      scales: group name -> ``s [*scan, *batch, K]``, positive, equal on channels that share one.

    Raises:
      PlanError: a group has no absorber, so that its scale would change the output.
      ShapeError: a scale does not have its group's shape.
    """
    for g in plan.groups:
        if g.name in scales and not g.absorbers:
            raise PlanError(f"group {g.name} cannot absorb a scale: {g.reason or 'it has no absorber'}")
    folder = Folder(plan, scales)
    return paths.map_with_path(folder.leaf, params)
