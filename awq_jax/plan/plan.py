"""`Plan`: which matmuls share an input, and which parameters can absorb a scale of that input."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax.errors import PlanError
from awq_jax.report import Share
from awq_jax.trace.views import Window

VERSION = 1
HEAD = "makes the model's output"
ROUTER = "routes tokens to experts"
TIED = "it is also read by a lookup (tied embedding)"


@dataclasses.dataclass(frozen=True)
class Site:
    """A matmul of an activation with a parameter leaf, or with a part of one.

    Attributes:
      path: parameter path of the weight (see `awq_jax.paths`).
      axes: role of each axis of the leaf: ``s`` scanned layers, ``b`` batch (experts), ``k``
        contracted, ``n`` output.
      shape: shape of the leaf.
      head: its result is the model's output with no further matmul after it.
      router: its result picks what runs (the experts of a token), so that a small error may change all.
      scanned: the ``s`` axes in the order of the loops that slice them, outermost first; () if that is their
        order in the leaf.
      part: where the part that is multiplied begins along each axis of the leaf, and its size; () for all of it.
    """

    path: str
    axes: str
    shape: tuple[int, ...]
    head: bool = False
    router: bool = False
    scanned: tuple[int, ...] = ()
    part: Window = ()

    @property
    def canonical_axes(self) -> str:
        """``axes`` as `awq_jax.qtensor` takes them: scanned axes are batch axes."""
        return self.axes.replace("s", "b")

    @property
    def name(self) -> str:
        """The path, with the part as an index if it is not the whole leaf: ``gating[1]``, ``qkv[:, 64:128]``."""
        if not self.part:
            return self.path
        spans = [
            ":" if (start, size) == (0, n) else str(start) if size == 1 else f"{start}:{start + size}"
            for (start, size), n in zip(self.part, self.shape, strict=True)
        ]
        while spans[-1] == ":":
            spans.pop()
        return f"{self.path}[{', '.join(spans)}]"

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of what is multiplied, with as many axes as the leaf."""
        return tuple(size for _, size in self.part) or self.shape

    @property
    def window(self) -> tuple[slice, ...]:
        """Index of the part."""
        return tuple(slice(start, start + size) for start, size in self.part)

    @property
    def scan_axes(self) -> tuple[int, ...]:
        """Axes of scanned layers, outermost loop first."""
        return self.scanned or tuple(d for d, a in enumerate(self.axes) if a == "s")

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """Axes that the matmul runs over; a stack of which one slice is read is none."""
        picked = [bool(self.part) and n == 1 != whole for n, whole in zip(self.part_shape, self.shape, strict=True)]
        return tuple(d for d, a in enumerate(self.axes) if a == "b" and not picked[d])

    def extent(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """(scan, batch, K): sizes of scanned axes and of batch axes, and the contracted size."""
        sizes = self.part_shape
        k = math.prod(n for n, a in zip(sizes, self.axes, strict=True) if a == "k")
        return tuple(sizes[d] for d in self.scan_axes), tuple(sizes[d] for d in self.batch_axes), k


@dataclasses.dataclass(frozen=True, eq=False)
class Absorber:
    """A parameter whose elements can be divided by the scale so that the output stays the same.

    Attributes:
      path: parameter path.
      index: int32, same rank as the leaf without its scanned axes, each axis either of the leaf's
        size or 1 (broadcast): the channel of the scale (flat over ``[*batch, K]``) that divides
        each element; -1 leaves it alone.
      offset: the model uses ``offset + parameter`` (1 for ``1 + w`` norms): the sum is divided.
      scanned: the leaf's scanned axes, outermost loop first; () if they are the first.
    """

    path: str
    index: np.ndarray
    offset: float = 0.0
    scanned: tuple[int, ...] = ()

    def scan_axes(self, count: int) -> tuple[int, ...]:
        """The leaf's axes of ``count`` scans, outermost first."""
        return self.scanned or tuple(range(count))


@dataclasses.dataclass(frozen=True, eq=False)
class Follows:
    """The group whose scale another one takes.

    Attributes:
      group: its name.
      index: int32, for each channel, flat over ``[*batch, K]``, the channel of that group, likewise flat.
    """

    group: str
    index: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class ScaleGroup:
    """Sites that read the same activation, and the parameters upstream that absorb its scale.

    Attributes:
      name: unique; the name of the first site. Calibration statistics are filed under it.
      sites: weights multiplied by the scale (also those that are not quantized, e.g. a router).
      absorbers: parameters divided by the scale; empty if nothing can absorb it.
      shared_channels: int32 ``[prod(batch)*K]`` or None: channels with equal numbers must share one scale.
      scan: sizes of the scanned axes: the scale is ``[*scan, *batch, K]``.
      batch: sizes of the batch (expert) axes of the *activation*.
      channels: K.
      reason: why nothing can absorb the scale, for the user to read; "" otherwise.
      follows: the group whose scale, absorbed there, this one takes, as both read one value; None if it has its own.
    """

    name: str
    sites: tuple[Site, ...]
    channels: int
    absorbers: tuple[Absorber, ...] = ()
    shared_channels: np.ndarray | None = None
    scan: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    reason: str = ""
    follows: Follows | None = None

    @property
    def is_folded(self) -> bool:
        """Whether a scale of it is absorbed upstream."""
        return bool(self.absorbers) or self.follows is not None

    def without_absorbers(self, reason: str) -> ScaleGroup:
        """The group when nothing absorbs its scale, for ``reason``."""
        return dataclasses.replace(self, absorbers=(), shared_channels=None, reason=reason, follows=None)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All scale groups of a model, in the order the forward pass meets them.

    Attributes:
      groups: the scale groups.
      skipped: path -> reason, for parameters used in a matmul that cannot be quantized.
      sizes: path -> bytes, of all that matmuls read; those whose result is not used, embeddings that are only looked
        up, and kernels of convolutions that are no matmuls, are not among them. Empty in a plan written by hand.
    """

    groups: tuple[ScaleGroup, ...]
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def share(self) -> Share:
        """What is packed of all that matmuls read by default: no head, tied or not, and no router."""
        kept = {s.path: HEAD for _, s in self.sites() if s.head} | {s.path: ROUTER for _, s in self.sites() if s.router}
        tied = [path for path, why in self.skipped.items() if why == TIED]
        return Share.of(self.sizes, {**self.skipped, **kept}, {*kept, *tied})

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
                    "absorbers": [
                        {"path": a.path, "index": _encode(a.index), "offset": a.offset, "scanned": list(a.scanned)}
                        for a in g.absorbers
                    ],
                    "ties": None if g.shared_channels is None else _encode(g.shared_channels),
                    "scan": list(g.scan),
                    "batch": list(g.batch),
                    "reason": g.reason,
                    **({"follows": {"group": g.follows.group, "index": _encode(g.follows.index)}} if g.follows else {}),
                }
                for g in self.groups
            ],
            "skipped": dict(self.skipped),
            "sizes": dict(self.sizes),
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
                        Site(
                            s["path"],
                            s["axes"],
                            tuple(s["shape"]),
                            bool(s.get("head")),
                            bool(s.get("router")),
                            tuple(s.get("scanned", ())),
                            tuple((a, n) for a, n in s.get("part", ())),
                        )
                        for s in g["sites"]
                    ),
                    channels=int(g["channels"]),
                    absorbers=tuple(
                        Absorber(
                            a["path"], _decode(a["index"]), float(a.get("offset", 0.0)), tuple(a.get("scanned", ()))
                        )
                        for a in g["absorbers"]
                    ),
                    shared_channels=None if g.get("ties") is None else _decode(g["ties"]),
                    scan=tuple(g.get("scan", ())),
                    batch=tuple(g.get("batch", ())),
                    reason=g.get("reason", ""),
                    follows=Follows(f["group"], _decode(f["index"])) if (f := g.get("follows")) else None,
                )
                for g in data["groups"]
            )
            return cls(groups, dict(data.get("skipped", {})), {p: int(n) for p, n in data.get("sizes", {}).items()})
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
            for s in g.sites:
                mark = "  (head)" if s.head else "  (router)" if s.router else ""
                lines.append(f"    reads  {s.name} {s.shape} {s.axes}{mark}")
            scaled = [f"    absorb {a.path}" for a in g.absorbers]
            scaled += [f"    scaled as {g.follows.group}"] if g.follows else []
            lines += scaled or [f"    no absorber: {g.reason}"]
        lines += [f"{path}  left float: {why}" for path, why in self.skipped.items()]
        if self.sizes:
            lines.append(f"packed by default: {self.share}")
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
