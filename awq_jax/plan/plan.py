"""`Plan`: which matmuls share an input, and which parameters can absorb a scale of that input."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax.errors import PlanError

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Site:
    """A matmul of an activation with a parameter leaf.

    Attributes:
      path: parameter path of the weight (see `awq_jax.paths`).
      axes: role of each axis of the leaf: ``s`` scanned layers, ``b`` batch (experts), ``k``
        contracted, ``n`` output. ``s`` axes come first.
      shape: shape of the leaf.
      head: its result is the model's output with no further matmul after it.
      router: its result picks what runs (the experts of a token), so that a small error may change all.
    """

    path: str
    axes: str
    shape: tuple[int, ...]
    head: bool = False
    router: bool = False

    @property
    def canonical_axes(self) -> str:
        """``axes`` as `awq_jax.qtensor` takes them: scanned axes are batch axes."""
        return self.axes.replace("s", "b")


@dataclasses.dataclass(frozen=True, eq=False)
class Absorber:
    """A parameter whose elements can be divided by the scale so that the output stays the same.

    Attributes:
      path: parameter path.
      index: int32, same rank as the leaf without its scanned axes, each axis either of the leaf's
        size or 1 (broadcast): the channel of the scale (flat over ``[*batch, K]``) that divides
        each element; -1 leaves it alone.
      offset: the model uses ``offset + parameter`` (1 for ``1 + w`` norms): the sum is divided.
    """

    path: str
    index: np.ndarray
    offset: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class ScaleGroup:
    """Sites that read the same activation, and the parameters upstream that absorb its scale.

    Attributes:
      name: unique; the path of the first site. Calibration statistics are filed under it.
      sites: weights multiplied by the scale (also those that are not quantized, e.g. a router).
      absorbers: parameters divided by the scale; empty if nothing can absorb it.
      shared_channels: int32 ``[prod(batch)*K]`` or None: channels with equal numbers must share one scale.
      scan: sizes of the scanned axes: the scale is ``[*scan, *batch, K]``.
      batch: sizes of the batch (expert) axes of the *activation*.
      channels: K.
      reason: why nothing can absorb the scale, for the user to read; "" otherwise.
    """

    name: str
    sites: tuple[Site, ...]
    channels: int
    absorbers: tuple[Absorber, ...] = ()
    shared_channels: np.ndarray | None = None
    scan: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """All scale groups of a model, in the order the forward pass meets them.

    Attributes:
      groups: the scale groups.
      skipped: path -> reason, for parameters used in a matmul that cannot be quantized.
    """

    groups: tuple[ScaleGroup, ...]
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def sites(self) -> Iterator[tuple[ScaleGroup, Site]]:
        """Every site with its group."""
        for group in self.groups:
            for site in group.sites:
                yield group, site

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; index arrays are run-length coded (see `from_dict`)."""
        return {
            "version": VERSION,
            "groups": [
                {
                    "name": g.name,
                    "sites": [dataclasses.asdict(s) for s in g.sites],
                    "channels": g.channels,
                    "absorbers": [{"path": a.path, "index": _encode(a.index), "offset": a.offset} for a in g.absorbers],
                    "ties": None if g.shared_channels is None else _encode(g.shared_channels),
                    "scan": list(g.scan),
                    "batch": list(g.batch),
                    "reason": g.reason,
                }
                for g in self.groups
            ],
            "skipped": dict(self.skipped),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_dict`.

        Raises:
          PlanError: if the data is not a plan of this version.
        """
        try:
            if data["version"] != VERSION:
                raise PlanError(f"plan version {data['version']}; this release reads {VERSION}")
            groups = tuple(
                ScaleGroup(
                    name=g["name"],
                    sites=tuple(
                        Site(s["path"], s["axes"], tuple(s["shape"]), bool(s.get("head")), bool(s.get("router")))
                        for s in g["sites"]
                    ),
                    channels=int(g["channels"]),
                    absorbers=tuple(
                        Absorber(a["path"], _decode(a["index"]), float(a.get("offset", 0.0))) for a in g["absorbers"]
                    ),
                    shared_channels=None if g.get("ties") is None else _decode(g["ties"]),
                    scan=tuple(g.get("scan", ())),
                    batch=tuple(g.get("batch", ())),
                    reason=g.get("reason", ""),
                )
                for g in data["groups"]
            )
            return cls(groups, dict(data.get("skipped", {})))
        except (KeyError, TypeError, AttributeError) as e:
            raise PlanError(f"not a plan: {type(e).__name__}: {e}") from None

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote (or what a user edited).

        Raises:
          PlanError: if the file is not a plan.
        """
        try:
            data = json.loads(Path(path).read_text())
        except json.JSONDecodeError as e:
            raise PlanError(f"{path} is not JSON: {e}") from None
        return cls.from_dict(data)

    def __str__(self) -> str:
        lines = []
        for g in self.groups:
            lines.append(f"{g.name}  [{' x '.join(map(str, (*g.scan, *g.batch, g.channels)))}]")
            lines += [f"    reads  {s.path} {s.shape} {s.axes}{'  (head)' if s.head else ''}" for s in g.sites]
            lines += [f"    absorb {a.path}" for a in g.absorbers] or [f"    no absorber: {g.reason}"]
        lines += [f"{path}  left float: {why}" for path, why in self.skipped.items()]
        return "\n".join(lines)


def _encode(index: np.ndarray) -> dict[str, list[int] | list[list[int]]]:
    """Runs ``[start, step, length]`` of the flattened array."""
    flat = np.asarray(index).ravel().tolist()
    runs: list[list[int]] = []
    for v in flat:
        if runs:
            start, step, n = runs[-1]
            if n == 1 and v - start in (0, 1):
                runs[-1] = [start, v - start, 2]
                continue
            if n > 1 and v == start + step * n:
                runs[-1][2] += 1
                continue
        runs.append([v, 0, 1])
    return {"shape": list(np.shape(index)), "runs": runs}


def _decode(data: Mapping[str, Any]) -> np.ndarray:
    parts = [start + step * np.arange(n) for start, step, n in data["runs"]]
    flat = np.concatenate(parts) if parts else np.zeros(0)
    shape = tuple(data["shape"])
    if flat.size != np.prod(shape, dtype=int):
        raise PlanError(f"index of shape {shape} has {flat.size} entries")
    return flat.astype(np.int32).reshape(shape)
