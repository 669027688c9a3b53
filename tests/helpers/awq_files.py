"""Checkpoints in AutoAWQ's layouts, made without the library's packing: one nibble at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from awq_jax import convert
from awq_jax.convert import registry
from awq_jax.convert.arrays import codes, linear
from awq_jax.qtensor import QuantizedTensor

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8}
NAME = "model.layers.0.mlp.up_proj.weight"


def make(k: int, n: int, group: int, seed: int = 0, form: str = "zeros", dtype: Any = np.float16) -> QuantizedTensor:
    """A random weight that uses all codes and zero points; ``form``: "zeros", "offsets" or "symmetric"."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.001, 0.1, (k // group, n)).astype(dtype)
    zeros = offsets = None
    if form == "zeros":
        zeros = rng.integers(0, 16, scales.shape).astype(np.uint8)
        zeros.flat[:2] = 0, 15
    if form == "offsets":
        offsets = (-scales * rng.integers(0, 16, scales.shape)).astype(dtype)
    packed = codes.pack(rng.integers(0, 16, (k, n)).astype(np.uint8), 4)
    return linear.build(packed, scales, zeros, 4, group, k, n, "float32", offsets=offsets)


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    for part in ("qweight", "scales", "zeros", "offsets", "inv_scale"):
        x, y = getattr(a, part), getattr(b, part)
        if (x is None) != (y is None):
            return False
        if x is not None and (x.dtype != y.dtype or x.shape != y.shape or x.tobytes() != y.tobytes()):
            return False
    return (a.bits, a.group_size, a.shape) == (b.bits, b.group_size, b.shape)


def write(directory: Path, tensors: dict[str, Any], to: str, config: dict | None = None, **options: Any) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    convert.write_checkpoint(directory, tensors.items(), CONFIG | (config or {}), to, **options)
    return directory


def read(directory: Path, name: str = NAME) -> QuantizedTensor:
    q = registry.open_source(directory).read(name)
    assert isinstance(q, QuantizedTensor)
    return q


def save(directory: Path, arrays: dict[str, np.ndarray], quant: dict[str, Any] | None, **config: Any) -> Path:
    """A checkpoint made without the library."""
    directory.mkdir(exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, directory / "model.safetensors")
    quantization = {} if quant is None else {"quantization_config": {"quant_method": "awq", "bits": 4} | quant}
    (directory / "config.json").write_text(json.dumps(CONFIG | quantization | config))
    return directory


def nibble_words(rows: list[list[int]], dtype: type, width: int) -> np.ndarray:
    """Rows of nibbles, ``width`` to an integer, lowest first; in Python integers."""
    out = [
        [sum(row[i + j] << (4 * j) for j in range(width)) for i in range(0, len(row), width)]
        for row in [list(map(int, r)) for r in rows]
    ]
    return np.array(out, np.uint64).astype({4: np.uint16, 8: np.uint32}[width]).view(dtype)


def gemm_words(w: np.ndarray) -> np.ndarray:
    n = w.shape[1]
    rows = [[row[c + o] for c in range(0, n, 8) for o in (0, 2, 4, 6, 1, 3, 5, 7)] for row in w]
    return nibble_words(rows, np.int32, 8)


def gemv_words(w: np.ndarray) -> np.ndarray:
    return nibble_words([list(column) for column in w.T], np.int32, 8)


def fast_words(w: np.ndarray) -> np.ndarray:
    k, n = w.shape
    pairs = [8 * b + 2 * a + c for a in range(4) for b in range(4) for c in range(2)]  # (4, 4, 2) with two axes swapped
    order = [pairs[e + o] for e in range(0, 32, 8) for o in (0, 2, 4, 6, 1, 3, 5, 7)]
    rows = []
    for first in range(0, n, 4):
        blocks = [w[b + i : b + i + 32, first + j] for b in range(0, k, 64) for j in range(4) for i in (0, 32)]
        rows.append([block[o] for block in blocks for o in order])
    return nibble_words(rows, np.int16, 4)


def marlin_words(w: np.ndarray) -> np.ndarray:
    k, n = w.shape
    rows = []
    for t in range(0, k, 16):
        tiles = [w[t : t + 16, c : c + 16] for c in range(0, n, 16)]
        row: list[int] = []
        for u in range(0, len(tiles), 4):
            for i in range(32):
                for tile in tiles[u : u + 4]:
                    r = 2 * (i % 4)
                    fragment = [tile[x, i // 4 + 8 * block] for block in (0, 1) for x in (r, r + 1, r + 8, r + 9)]
                    row += [fragment[e] for e in (0, 2, 4, 6, 1, 3, 5, 7)]
        rows.append(row)
    return nibble_words(rows, np.int32, 8)
