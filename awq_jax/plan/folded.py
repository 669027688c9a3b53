"""What scales a plan folds into each weight, channel by channel: for adapters that were trained without them."""

import base64
import math
from collections.abc import Mapping

import numpy as np

from awq_jax.plan.fold import Folder, Scales, ScaleStep
from awq_jax.plan.plan import Plan, Site
from awq_jax.qtensor import split_shape
from awq_jax.report import FoldedScale


def channel_scales(plan: Plan, scales: Scales) -> dict[str, FoldedScale]:
    """The scales of inputs and outputs of each weight, by path.

    Weights whose scale is no product of one of their rows and one of their columns are left out: parts of one leaf that
    read different activations.

    Args:
      plan: scale groups.
      scales: group name -> ``s [*scan, *batch, K]``, of groups with absorbers.

    Raises:
      PlanError, ShapeError: see `Folder`.
    """
    folder = Folder(plan, {name: np.asarray(s, np.float32) for name, s in scales.items()})
    out: dict[str, FoldedScale] = {}
    for site in {s.path: s for _, s in plan.sites()}.values():
        steps = folder.steps(site.path)
        found = [_along(site, steps, kind, role) for kind, role in (("times", "k"), ("over", "n"))]
        if any(isinstance(f, np.ndarray) for f in found) and not any(isinstance(f, str) for f in found):
            out[site.path] = FoldedScale(*(f if isinstance(f, np.ndarray) else None for f in found))
    return out


def as_text(scales: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Scales by group for JSON, to the bit."""
    return {name: base64.b64encode(np.asarray(s, "<f4").tobytes()).decode() for name, s in scales.items()}


def of_text(texts: Mapping[str, str], plan: Plan) -> dict[str, np.ndarray]:
    """The inverse, for groups of ``plan``."""
    shapes = {g.name: (*g.scan, *g.batch, g.channels) for g in plan.groups if g.name in texts}
    return {
        name: np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32).reshape(shapes[name])
        for name, text in texts.items()
    }


def _along(site: Site, steps: tuple[ScaleStep, ...], kind: str, role: str) -> np.ndarray | str | None:
    """The product of the steps of one kind, float32 ``[*B, channels]``; None if there is none, a text if it is no such
    vector."""
    mine = [np.asarray(s.values, np.float32) for s in steps if s.kind == kind]
    if not mine:
        return None
    axes = site.canonical_axes
    values = mine[0]
    for more in mine[1:]:
        values = values * more
    kept = [n if a in ("b", role) else m for n, m, a in zip(site.shape, values.shape, axes, strict=True)]
    values = np.broadcast_to(values, kept)
    order = [d for r in ("b", role, "n" if role == "k" else "k") for d, a in enumerate(axes) if a == r]
    batch, k, n = split_shape(site.shape, axes)
    channels = math.prod(k if role == "k" else n)
    flat = values.transpose(order).reshape(*batch, channels, -1)
    return flat[..., 0].copy() if (flat == flat[..., :1]).all() else "differs"
