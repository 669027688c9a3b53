"""`validate`: does a plan, perhaps edited by hand, describe the parameters it is used with?"""

import math
from collections.abc import Mapping

import numpy as np

from awq_jax import paths
from awq_jax.errors import PlanError
from awq_jax.plan.plan import Plan, ScaleGroup, Site

Shapes = Mapping[str, tuple[int, ...]]  # by path


def validate(plan: Plan, params: object) -> None:
    """Check that ``plan`` describes ``params``.

    Raises:
      PlanError: names the group and the path: missing, another shape, an index out of range.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in paths.flatten(params).items()}
    names: set[str] = set()
    owner: dict[str, str] = {}
    for g in plan.groups:
        if g.name in names:
            raise PlanError(f"two groups are called {g.name}: group names must differ")
        names.add(g.name)
        if not g.sites:
            raise PlanError(f"group {g.name} has no site: remove it from the plan")
        for site in g.sites:
            if owner.setdefault(site.path, g.name) != g.name:
                raise PlanError(f"{site.path} is a site of two groups, {owner[site.path]} and {g.name}")
            _check_site(g, site, shapes)
        width = math.prod(g.batch) * g.channels
        for a in g.absorbers:
            _check_absorber(g, a.path, np.asarray(a.index), width, shapes)
        if g.shared_channels is not None and (np.shape(g.shared_channels) != (width,)):
            raise PlanError(f"group {g.name}: shared_channels has shape {np.shape(g.shared_channels)}, not ({width},)")


def _leaf_shape(group: ScaleGroup, path: str, shapes: Shapes) -> tuple[int, ...]:
    if path not in shapes:
        close = sorted(p for p in shapes if p.split("/")[-2:] == path.split("/")[-2:])[:3]
        hint = f"; similar: {', '.join(close)}" if close else ""
        raise PlanError(f"group {group.name}: the parameters have no {path}{hint}")
    return shapes[path]


def _check_site(group: ScaleGroup, site: Site, shapes: Shapes) -> None:
    shape = _leaf_shape(group, site.path, shapes)
    if shape != tuple(site.shape):
        raise PlanError(f"group {group.name}: {site.path} has shape {shape}, the plan says {tuple(site.shape)}")
    axes = site.axes
    if len(axes) != len(shape) or set(axes) - set("sbkn") or "k" not in axes or "n" not in axes:
        raise PlanError(f"group {group.name}: axes {axes!r} do not describe {site.path} of shape {shape}")
    if "s" in axes.lstrip("s"):
        raise PlanError(f"group {group.name}: {site.path}: scanned axes must come first, not {axes!r}")
    sizes = {r: tuple(n for n, a in zip(shape, axes, strict=True) if a == r) for r in "sbk"}
    if sizes["s"] != tuple(group.scan):
        raise PlanError(f"group {group.name}: {site.path} has scanned axes {sizes['s']}, the group {group.scan}")
    if group.batch and sizes["b"] != tuple(group.batch):
        raise PlanError(f"group {group.name}: {site.path} has batch axes {sizes['b']}, the group {group.batch}")
    k = math.prod(sizes["k"])
    if k != group.channels:
        raise PlanError(f"group {group.name}: {site.path} contracts {k} channels, the group has {group.channels}")


def _check_absorber(group: ScaleGroup, path: str, index: np.ndarray, width: int, shapes: Shapes) -> None:
    shape = _leaf_shape(group, path, shapes)
    lead = len(group.scan)
    if shape[:lead] != tuple(group.scan):
        raise PlanError(f"group {group.name}: absorber {path} of shape {shape} does not start with {group.scan}")
    inner = shape[lead:]
    if index.ndim != len(inner) or any(i not in (1, n) for i, n in zip(index.shape, inner, strict=True)):
        raise PlanError(f"group {group.name}: index of shape {index.shape} does not fit absorber {path} {shape}")
    if index.size and (index.min() < -1 or index.max() >= width):
        raise PlanError(
            f"group {group.name}: absorber {path}: index {int(index.max())} is out of range for {width} channels"
        )
