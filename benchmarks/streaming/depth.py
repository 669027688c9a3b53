"""Resident memory and compilations, block by block, of a very deep model."""

import gc
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from shared import checkpoints, running

import awq_jax

SETTLED = 50  # blocks after which memory may no longer grow


def deep(directory: Path, target: Path, *, samples: int = 8, seq_len: int = 64, options: str = "") -> running.Row:
    """Quantize in this process; slope and compilations from block to block."""
    calib = checkpoints.token_file(directory, target.parent, samples, seq_len)
    compiled: list[str] = []
    marks: list[tuple[int, int, int]] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    def block_is_done(done: int, total: int | None) -> None:
        """Notes compilations, resident bytes and live objects."""
        objects = len(gc.get_objects()) if len(marks) % 100 == 0 else 0
        marks.append((len(compiled), running.status_bytes("VmRSS"), objects))

    jax.monitoring.register_event_duration_secs_listener(listen)
    start, chosen = time.perf_counter(), running.settings(options.split())
    done = awq_jax.quantize_checkpoint(directory, target, calib, progress=block_is_done, **chosen)
    seconds = time.perf_counter() - start
    layers = marks[2:-1]  # at the start, embedding, layers, head
    settled = np.array([b for _, b, _ in layers[min(SETTLED, len(layers) // 2) :]], float)
    rows = json.loads(json.dumps(done.report.to_dict()["layers"]))  # as the manifest keeps them until the end
    # The keys of a row are shared by all of them.
    kept = sum(sys.getsizeof(row) + sum(map(sys.getsizeof, row.values())) for row in rows)
    return {
        "blocks": len(layers),
        "seconds": seconds,
        "compiled_before_first_layer": marks[1][0],
        "compiled_at_first_layer": layers[0][0] - marks[1][0],
        "compiled_at_later_layers": layers[-1][0] - layers[0][0],
        "compiled_at_the_end": len(compiled) - layers[-1][0],
        "resident_bytes_every_100": [b for _, b, _ in layers[::100]],
        "slope_bytes_per_block": float(np.polyfit(np.arange(settled.size), settled, 1)[0]),
        "report_bytes_per_block": kept / len(layers),
        "objects_every_100": [o for _, _, o in marks if o],
        "resident_bytes_at_the_end": running.status_bytes("VmRSS"),
    }
