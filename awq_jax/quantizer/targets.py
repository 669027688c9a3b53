"""Which weights of a plan are quantized, and to what: settings, skips, and sizes that do not divide."""

import dataclasses
import math
from collections.abc import Collection

from awq_jax.config import AwqConfig, LeafConfig
from awq_jax.errors import ConfigError, Setting, ShapeError
from awq_jax.plan.plan import HEAD, ROUTER, TIED, Plan, ScaleGroup, Site
from awq_jax.quantizer import adapters, parts, patterns
from awq_jax.report import Share

QUANTIZE_HEAD = Setting("quantize_head", True)


@dataclasses.dataclass(frozen=True)
class Target:
    """A weight to be quantized.

    Attributes:
      site, group: where it stands in the plan.
      leaf: its storage, group size resolved (never -1).
      k: its contracted size.
    """

    site: Site
    group: ScaleGroup
    leaf: LeafConfig
    k: int

    @property
    def rows(self) -> int:
        """K rounded up to a multiple of the group size."""
        g = self.leaf.group_size
        return -(-self.k // g) * g


def select(
    plan: Plan, config: AwqConfig, parameters: Collection[str] = (), factors: Collection[str] = ()
) -> tuple[dict[str, Target], dict[str, str]]:
    """Targets by the name of the site, and the matmul weights left float with the reason.

    Args:
      plan: of the model.
      config: what to quantize to.
      parameters: paths of all parameters; a skip pattern may match one that is no weight.
      factors: paths of factors of adapters, besides those that are known by their names.

    Raises:
      ShapeError: the group size does not divide some weights and ``on_indivisible="error"``; the
        message lists all of them with the remedies.
      ConfigError: a pattern of ``config`` has no effect, or nothing would be quantized; the message says why.
    """
    targets: dict[str, Target] = {}
    skipped = dict(plan.skipped)
    bad: list[tuple[str, int, int]] = []
    sites: dict[str, list[Site]] = {}
    for group, site in plan.sites():
        leaf = config.leaf(site.path)
        _, _, k = site.extent()
        sites.setdefault(site.path, []).append(site)
        if leaf is None:
            skipped[site.path] = "matched a skip pattern"
        elif site.path in factors or adapters.is_named_factor(site.path):
            skipped[site.path] = adapters.REASON
        elif site.head and not config.quantize_head:
            skipped[site.path] = f"{HEAD} ({QUANTIZE_HEAD} quantizes it)"
        elif site.router and not site.head:
            skipped[site.path] = ROUTER
        elif math.prod(site.part_shape) == k:
            skipped[site.path] = "makes one number of each token"
        elif leaf.group_size == -1:
            targets[site.name] = Target(site, group, dataclasses.replace(leaf, group_size=k), k)
        elif k % leaf.group_size and config.on_indivisible != "pad":
            if config.on_indivisible == "float":
                skipped[site.path] = f"{k} rows are not a multiple of the group size {leaf.group_size}"
            else:
                bad.append((site.path, k, leaf.group_size))
        else:
            targets[site.name] = Target(site, group, leaf, k)
    for path, mine in sites.items():
        leaf = config.leaf(path)
        if path not in skipped and leaf is not None and (why := parts.problem(mine, leaf)):
            skipped[path] = why
        if path in skipped:  # all parts of a leaf are packed, or none
            for site in mine:
                targets.pop(site.name, None)
            bad = [entry for entry in bad if entry[0] != path]
    patterns.check(
        config,
        [*dict.fromkeys(t.site.path for t in targets.values()), *(path for path, _, _ in bad)],
        skipped,
        parameters,
    )
    if bad:
        raise _indivisible(bad)
    if not targets:
        why = "; ".join(f"{path}: {reason}" for path, reason in skipped.items())
        raise ConfigError(f"nothing would be quantized: {why or 'the model has no matmul'}")
    return targets, skipped


def share(plan: Plan, config: AwqConfig, targets: dict[str, Target], skipped: dict[str, str]) -> Share:
    """How much of what matmuls read is packed; ``targets``, ``skipped``: from `select`."""
    chosen = {p for p, why in skipped.items() if why in (ROUTER, adapters.REASON) or why.startswith(HEAD)}
    chosen |= {p for p, why in skipped.items() if config.leaf(p) is None or (why == TIED and not config.quantize_head)}
    packed = {t.site.path for t in targets.values()}
    return Share.of(plan.sizes, {p: why for p, why in skipped.items() if p not in packed}, chosen)


def _indivisible(bad: list[tuple[str, int, int]]) -> ShapeError:
    lines = [f"  {path}: {k} rows, group size {g}" for path, k, g in bad]
    common = math.gcd(*(k for _, k, _ in bad))
    fits = [g for g in range(16, 257, 16) if common % g == 0]
    fitting = Setting("group_size", max(fits, default=0))
    column, pad, leave = Setting("group_size", -1), Setting("on_indivisible", "pad"), Setting("on_indivisible", "float")
    return ShapeError(
        f"the group size does not divide {len(bad)} weights:\n"
        + "\n".join(lines)
        + (f"\n{fitting} divides all of them; or " if fits else "\n")
        + f"{column} (one scale per column), {pad} (zero rows; not every checkpoint format can hold it), "
        f"{leave} (leave them float), or an override for these paths",
        *(fitting, column, pad, leave),
    )


def scale_dtype(largest: float, leaf: LeafConfig, config: AwqConfig) -> str:
    """The dtype that is asked for, unless that is float16 and the weights are too large or too small for it."""
    if config.scale_dtype != "float16":
        return config.scale_dtype
    step = largest * 2 / (2**leaf.bits - 1)
    return "float16" if step == 0 or 2.0**-14 <= step < 3e4 else "float32"
