"""Which tile sizes a CUDA kernel runs with: read from tables, never searched for at run time.

``tuned/*.json`` holds one table per chip, ``{"chip", "source", "rules", "shapes"}``. A rule gives a
configuration for up to ``rows`` activation rows (null: any number) and, where it says so, only for
``bits``; an entry of ``shapes`` does so for one (k, n), and wins. Tables measured on a device
(``nvidia-h200.json``; made by ``awq-jax bench tune``) go before those of its architecture
(``sm_90.json``), which were chosen offline by counting instructions, registers and shared memory.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from awq_jax.errors import ConfigError
from awq_jax.pack import PLANE, planes

FOLDER = Path(__file__).parent / "tuned"
BUCKETS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
KERNELS = ("mma", "gemv", "dequantize")
_given: dict[str, dict[str, Any]] = {}  # tables by chip, see `use`


@dataclasses.dataclass(frozen=True)
class Chip:
    """An NVIDIA GPU as the kernels see it.

    Attributes:
      kind: its name, e.g. ``"NVIDIA H200"``.
      sm: compute capability times ten, e.g. 90.
      cores: multiprocessors.
    """

    kind: str
    sm: int
    cores: int

    @property
    def slug(self) -> str:
        """The stem of its table: lower case, words joined by hyphens."""
        return re.sub(r"[^a-z0-9]+", "-", self.kind.lower()).strip("-")


@dataclasses.dataclass(frozen=True)
class Config:
    """How one product runs.

    Attributes:
      kernel: ``"mma"`` (tensor cores), ``"gemv"`` (ordinary arithmetic) or ``"dequantize"`` (to a dense
        weight, then XLA's product).
      block_m: activation rows per program (mma).
      block_n: output columns per program.
      split: parts of K, summed after; 0 takes as many as fill the chip.
      warps: per program.
      stages: loads in flight per program.
      late: scale the products of a group instead of its weights: fewer instructions for few rows, and
        scales stay float32.
      resident: programs that fit one multiprocessor at a time (by registers and shared memory).
    """

    kernel: str
    block_m: int = 16
    block_n: int = 128
    split: int = 0
    warps: int = 4
    stages: int = 4
    late: bool = True
    resident: int = 2

    def __post_init__(self) -> None:
        sizes = (self.block_m, self.block_n, self.warps)
        if self.kernel not in KERNELS or any(v < 1 or v & (v - 1) for v in sizes) or self.split < 0 or self.stages < 1:
            raise ConfigError(f"not a kernel configuration: {self}; see awq_jax.kernels.tuned.Config")

    def splits(self, chip: Chip, batch: int, m: int, k: int, n: int, bits: int) -> int:
        """Parts of K: as given, or the fewest that keep nine tenths of the chip busy.

        A part is at least four runs of K, and the partial sums, written and read again in float32, are at most
        half of the weight's bytes: ``8 * split * m * n <= k * n * bits / 16``.
        """
        runs = -(-k // (PLANE * planes(bits)))
        if self.split:
            return min(self.split, runs)
        rows = 1 if self.kernel == "gemv" else self.block_m
        tiles = batch * -(-m // rows) * -(-n // self.block_n)
        slots = chip.cores * self.resident
        most = max(1, min(runs // 4, k * bits // (128 * m), 64))

        def busy(split: int) -> float:
            programs = tiles * split
            return programs / (-(-programs // slots) * slots)

        return next((s for s in range(1, most + 1) if busy(s) >= 0.9), max(range(1, most + 1), key=busy))


def bucket(m: int) -> int | None:
    """The smallest of `BUCKETS` that holds ``m`` rows; None beyond the last."""
    return next((b for b in BUCKETS if m <= b), None)


def choose(chip: Chip, bits: int, m: int, k: int, n: int) -> Config:
    """The configuration for ``m`` rows times a ``bits``-bit ``[k, n]`` weight on ``chip``."""
    stems = (chip.slug, _architecture(chip.sm))
    tables = [t for t in (_given.get(chip.slug), *map(_table, stems)) if t is not None]
    for table in tables:
        for entry in table.get("shapes", ()):
            if (entry["k"], entry["n"], entry.get("bits", 4), entry["rows"]) == (k, n, bits, bucket(m)):
                return config(entry)
    for table in tables:
        for rule in table.get("rules", ()):
            if (rule["rows"] is None or m <= rule["rows"]) and rule.get("bits", bits) == bits:
                return config(rule)
    return Config("dequantize")


def use(chip: Chip, table: dict[str, Any]) -> None:
    """Let `choose` read this table before the files, in this process: what has just been measured, say.

    Programs that are compiled already keep what they chose.
    """
    _given[chip.slug] = table


def given(chip: Chip) -> str:
    """A name for what `use` was last given for this chip: what was traced under another is not for now."""
    return json.dumps(_given.get(chip.slug), sort_keys=True)


def config(entry: Mapping[str, Any]) -> Config:
    """A table's row as a `Config`.

    Raises:
      ConfigError: if a value makes no sense.
    """
    names = {f.name for f in dataclasses.fields(Config)}
    return Config(**{k: v for k, v in entry.items() if k in names})


@functools.cache
def local_chip() -> Chip | None:
    """The first CUDA device of this process, or None."""
    for device in jax.devices():
        if device.platform in ("cuda", "gpu") and "nvidia" in device.device_kind.lower():
            capability = str(getattr(device, "compute_capability", "0.0"))
            major, _, minor = capability.partition(".")
            return Chip(
                device.device_kind, int(major) * 10 + int(minor or 0), int(getattr(device, "core_count", 0)) or 108
            )
    return None


def _architecture(sm: int) -> str:
    """The table for a compute capability: that of the nearest generation below it."""
    return "sm_100" if sm >= 100 else "sm_90" if sm >= 90 else "sm_80"


@functools.cache
def _table(stem: str) -> dict[str, Any] | None:
    path = FOLDER / f"{stem}.json"
    return json.loads(path.read_text()) if path.is_file() else None
