"""Prove a plan on the model itself: fold random scales, and see that the output does not move."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax import paths
from awq_jax.errors import PlanError
from awq_jax.plan import fold
from awq_jax.plan.plan import Plan, ScaleGroup
from awq_jax.plan.validate import validate

_PIECE = 1 << 18  # numbers that are compared together


def verify(
    plan: Plan,
    fn: Callable[..., object],
    params: object,
    *args: object,
    seed: int = 0,
    tol: float = 1e-4,
    **kwargs: object,
) -> Plan:
    """The plan with the absorbers taken from every group whose scale is not absorbed exactly.

    Scales are powers of two, so folding rounds nothing: a right plan reproduces the output in any
    float dtype, a wrong one moves it by its own size. One compilation; groups are searched by
    halving, and only if all of them together moved the output.

    Args:
      plan: discovered or written by hand.
      fn: the model, called as ``fn(params, *args, **kwargs)``.
      params: float parameters.
      *args, **kwargs: a small real input.
      seed: of the scales.
      tol: largest difference allowed, relative to the largest output.

    Raises:
      PlanError: the plan does not describe ``params``, the inputs are abstract, or no output is float.
    """
    # Multiplying by 2^n changes only the exponent of a binary float. So w 2^n and (absorber) 2^-n are exact, unless
    # they leave the range of the dtype; whatever lies between them carries 2^-n in its exponent; and each product
    # (x 2^-n)(w 2^n) is x w to the bit. What may differ are sums that the compiler orders otherwise, and parameters
    # used as offset + w, where the sum is rounded (`_rounding`).
    validate(plan, params)
    groups = [g for g in plan.groups if g.absorbers]
    if not groups:
        return plan
    rest, tree = jax.tree.flatten((args, kwargs))
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in (*rest, *jax.tree.leaves(params))):
        raise PlanError("a plan is verified on real parameters and inputs; these are abstract")
    dynamic = [hasattr(x, "shape") for x in rest]

    @jax.jit
    def run(params: object, scales: dict[str, np.ndarray], arrays: list[jax.Array]) -> list[jax.Array]:
        it = iter(arrays)
        a, k = jax.tree.unflatten(tree, [next(it) if d else x for d, x in zip(dynamic, rest, strict=True)])
        out = jax.tree.leaves(fn(fold.apply(plan, params, scales), *a, **k))
        return [x for x in out if jnp.issubdtype(x.dtype, jnp.inexact)]

    arrays = [x for x, d in zip(rest, dynamic, strict=True) if d]
    rng = np.random.default_rng(seed)
    ones = {g.name: np.ones((*g.scan, *g.batch, g.channels), np.float32) for g in groups}
    random = {g.name: _random_scale(g, rng) for g in groups}
    before = run(params, ones, arrays)
    if not before:
        raise PlanError("a plan is verified on float outputs; this function returns none (let it return the logits)")
    tol = max(tol, _rounding(groups, params))

    def moved(scaled: list[ScaleGroup]) -> float:
        names = {g.name for g in scaled}
        after = run(params, {n: random[n] if n in names else ones[n] for n in ones}, arrays)
        return max((_distance(a, b) for a, b in zip(before, after, strict=True)), default=0.0)

    bad = _culprits(groups, moved, tol)

    def kept(g: ScaleGroup) -> ScaleGroup:
        return _without(g, bad[name]) if (name := g.follows.group if g.follows else g.name) in bad else g

    return dataclasses.replace(plan, groups=tuple(map(kept, plan.groups)))


def _random_scale(group: ScaleGroup, rng: np.random.Generator) -> np.ndarray:
    """Powers of two from 1/4 to 4, the same for channels that share one."""
    n = int(np.prod(group.batch, dtype=int)) * group.channels
    s = np.exp2(rng.integers(-2, 3, (*group.scan, n))).astype(np.float32)
    if group.shared_channels is not None:
        _, first, which = np.unique(group.shared_channels, return_index=True, return_inverse=True)
        s = s[..., first[which]]
    return s.reshape(*group.scan, *group.batch, group.channels)


def _rounding(groups: list[ScaleGroup], params: object) -> float:
    """What ``(offset + w) / s - offset`` loses when the parameter is stored in 16 bits."""
    leaves = paths.flatten(params)
    dtypes = {leaves[a.path].dtype for g in groups for a in g.absorbers if a.offset}
    return max((16 * float(jnp.finfo(d).eps) for d in dtypes), default=0.0)


def _distance(a: jax.Array, b: jax.Array) -> float:
    """Largest difference relative to the largest finite value of ``a``; inf if NaNs moved.

    Logits are large: nothing of their size is kept besides them.
    """
    x, y = (np.asarray(o).reshape(-1) for o in (a, b))
    moved, size, finite = 0.0, 1e-30, not x.size
    wide = np.promote_types(x.dtype, np.float32)
    for start in range(0, x.size, _PIECE):
        p, q = (o[start : start + _PIECE].astype(wide) for o in (x, y))
        there = np.isfinite(p)
        if (there != np.isfinite(q)).any():
            return float("inf")
        if there.any():
            finite = True
            p, q = p[there], q[there]
            moved, size = max(moved, float(np.abs(p - q).max())), max(size, float(np.abs(p).max()))
    return moved / size if finite else float("inf")


def _culprits(groups: list[ScaleGroup], moved: Callable[[list[ScaleGroup]], float], tol: float) -> dict[str, float]:
    """Groups whose scales move the output, and by how much."""
    shift = moved(groups)
    if shift <= tol:
        return {}
    if len(groups) == 1:
        return {groups[0].name: shift}
    half = len(groups) // 2
    found = _culprits(groups[:half], moved, tol) | _culprits(groups[half:], moved, tol)
    # Halves that are right alone but wrong together: none of them can be trusted.
    return found or {g.name: shift for g in groups}


def _without(group: ScaleGroup, shift: float) -> ScaleGroup:
    by = "made the output NaN or infinite" if np.isinf(shift) else f"moved the output by {shift:.1e} of its size"
    reason = f"verification: a scale on this group {by}"
    return group.without_absorbers(reason)
