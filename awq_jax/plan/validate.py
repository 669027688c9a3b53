"""`validate`: does a plan, perhaps edited by hand, describe the parameters it is used with?"""

import math
from collections.abc import Mapping

import numpy as np

from awq_jax import paths
from awq_jax.errors import PlanError
from awq_jax.plan.plan import Absorber, Plan, ScaleGroup, Site

Shapes = Mapping[str, tuple[int, ...]]  # by path


def validate(plan: Plan, params: object) -> None:
    """Check that ``plan`` describes ``params``.

    Raises:
      PlanError: names the group and the path: missing, another shape, an index out of range.
    """
    shapes = {path: np.shape(leaf) for path, leaf in paths.flatten(params).items()}
    names: set[str] = set()
    owner: dict[str, str] = {}
    parts: dict[str, list[Site]] = {}
    for g in plan.groups:
        if g.name in names:
            raise PlanError(f"two groups are called {g.name}: group names must differ")
        names.add(g.name)
        if not g.sites:
            raise PlanError(f"group {g.name} has no site: remove it from the plan")
        for site in g.sites:
            if owner.setdefault(site.name, g.name) != g.name:
                raise PlanError(f"{site.name} is a site of two groups, {owner[site.name]} and {g.name}")
            _check_site(g, site, shapes)
            for other in parts.setdefault(site.path, []):
                if overlap(site, other) or other.canonical_axes != site.canonical_axes:
                    raise PlanError(f"{site.path}: the sites {other.name} and {site.name} contradict each other")
            parts[site.path].append(site)
        width = math.prod(g.batch) * g.channels
        for a in g.absorbers:
            _check_absorber(g, a, np.asarray(a.index), width, shapes)
        if g.follows is not None:
            _check_follows(g, {other.name: other for other in plan.groups})
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
    if sorted(site.scan_axes) != [d for d, a in enumerate(axes) if a == "s"]:
        raise PlanError(f"group {group.name}: {site.path}: axes {axes!r} do not scan over {site.scanned}")
    if site.part and (
        len(site.part) != len(shape)
        or any(start < 0 or size < 1 or start + size > n for (start, size), n in zip(site.part, shape, strict=True))
    ):
        raise PlanError(f"group {group.name}: {site.path} of shape {shape} has no part {site.part}")
    scan, batch, k = site.extent()
    if scan != tuple(group.scan):
        raise PlanError(f"group {group.name}: {site.name} has scanned axes {scan}, the group {group.scan}")
    if group.batch and batch != tuple(group.batch):
        raise PlanError(f"group {group.name}: {site.name} has batch axes {batch}, the group {group.batch}")
    if k != group.channels:
        raise PlanError(f"group {group.name}: {site.name} contracts {k} channels, the group has {group.channels}")


def _check_follows(g: ScaleGroup, groups: Mapping[str, ScaleGroup]) -> None:
    assert g.follows is not None
    name, index = g.follows.group, np.asarray(g.follows.index)
    if name not in groups or groups[name].follows is not None or groups[name].scan != g.scan or g.absorbers:
        raise PlanError(
            f"group {g.name} cannot follow {name}: that must be a group of the same layers with a scale of its own"
        )
    width, mine = (math.prod(x.batch) * x.channels for x in (groups[name], g))
    if index.shape != (mine,) or (index.size and (index.min() < 0 or index.max() >= width)):
        raise PlanError(f"group {g.name}: the index into {name} must be {mine} channels of its {width}")


def overlap(a: Site, b: Site) -> bool:
    """Whether two sites of one leaf have an element in common."""
    whole = tuple((0, n) for n in a.shape)
    spans = zip(a.part or whole, b.part or whole, strict=True)
    return all(max(x, y) < min(x + n, y + m) for (x, n), (y, m) in spans)


def _check_absorber(group: ScaleGroup, a: Absorber, index: np.ndarray, width: int, shapes: Shapes) -> None:
    path, shape = a.path, _leaf_shape(group, a.path, shapes)
    scanned = a.scan_axes(len(group.scan))
    if tuple(shape[d] for d in scanned if d < len(shape)) != tuple(group.scan):
        raise PlanError(f"group {group.name}: absorber {path} of shape {shape} has no axes {group.scan} at {scanned}")
    inner = tuple(n for d, n in enumerate(shape) if d not in scanned)
    if index.ndim != len(inner) or any(i not in (1, n) for i, n in zip(index.shape, inner, strict=True)):
        raise PlanError(f"group {group.name}: index of shape {index.shape} does not fit absorber {path} {shape}")
    if index.size and (index.min() < -1 or index.max() >= width):
        raise PlanError(
            f"group {group.name}: absorber {path}: index {int(index.max())} is out of range for {width} channels"
        )
