"""Resident memory and compilations, block by block, of a very deep model."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import awq_jax
from awq_jax.stream import run

SETTLED = 50  # blocks after which memory may no longer grow


def deep(args: argparse.Namespace, calib: Path) -> dict[str, Any]:
    """Quantize in this process; slope and compilations from block to block."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    marks: list[tuple[int, int, int]] = []

    class Bar(run.tqdm):
        """Notes compilations, resident bytes and live objects where the progress bar moves."""

        def update(self, n: float | None = 1) -> bool | None:
            objects = len(gc.get_objects()) if len(marks) % 100 == 0 else 0
            marks.append((len(compiled), resident(), objects))
            return super().update(n)

    run.tqdm = Bar
    start = time.perf_counter()
    done = awq_jax.quantize_checkpoint(args.directory, args.out, calib, progress=False, **settings(args.options))
    seconds = time.perf_counter() - start
    layers = marks[2:-1]  # at the start, embedding, layers, head
    settled = np.array([b for _, b, _ in layers[SETTLED:]], float)
    slope = float(np.polyfit(np.arange(settled.size), settled, 1)[0])
    rows = json.loads(json.dumps(done.report.to_dict()["layers"]))  # as the manifest keeps them until the end
    kept = sum(_size(row) for row in rows) / len(layers)
    return {
        "blocks": len(layers),
        "seconds": seconds,
        "compiled_before_first_layer": marks[1][0],
        "compiled_at_first_layer": layers[0][0] - marks[1][0],
        "compiled_at_later_layers": layers[-1][0] - layers[0][0],
        "compiled_at_the_end": len(compiled) - layers[-1][0],
        "resident_bytes_every_100": [b for _, b, _ in itertools.islice(layers, 0, None, 100)],
        "slope_bytes_per_block": slope,
        "report_bytes_per_block": kept,
        "objects_every_100": [o for _, _, o in marks if o],
        "resident_bytes_at_the_end": resident(),
    }


def _size(row: dict[str, Any]) -> int:
    """Bytes of a row of the report; its keys are shared by all rows."""
    return sys.getsizeof(row) + sum(map(sys.getsizeof, row.values()))


def settings(options: str) -> dict[str, Any]:
    """``"bits=3 clip=False"`` as keyword arguments of `quantize_checkpoint`."""
    pairs = (item.split("=") for item in options.split())
    return {
        key: int(value) if value.isdigit() else {"True": True, "False": False}.get(value, value) for key, value in pairs
    }


def resident() -> int:
    """Resident bytes of this process."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))
