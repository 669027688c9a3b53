"""Which conversions are exact, found by doing them on a weight such as each format's own tools write."""

import numpy as np

from awq_jax.convert import pipeline
from awq_jax.convert.arrays import codes, linear
from awq_jax.convert.format import Destination, Example, Format
from awq_jax.convert.registry import FORMATS
from awq_jax.dtypes import FLOATS
from awq_jax.errors import FormatError
from awq_jax.qtensor import QuantizedTensor

NAME = "model.layers.0.mlp.up_proj.weight"
K, N = 512, 64


def table() -> dict[str, dict[str, float | None]]:
    """``{from: {to: largest deviation in steps, or None where it is impossible}}`` of every pair."""
    return {
        a.name: {b.name: _deviation(example(a.example), b) for b in FORMATS.values() if b.encoder is not None}
        for a in FORMATS.values()
        if a.example is not None
    }


def grid(table: dict[str, dict[str, float | None]]) -> list[tuple[str, ...]]:
    """The table as rows of text, the first one its head."""
    targets = list(next(iter(table.values())))
    head = ("from \\ to", *targets)
    return [head, *((source, *(_cell(row[t]) for t in targets)) for source, row in table.items())]


def example(kind: Example, seed: int = 0) -> QuantizedTensor:
    """A random weight ``[K, N]`` of that kind."""
    rng = np.random.default_rng(seed)
    groups = K // kind.group_size
    dtype = FLOATS[kind.scale_dtype]
    scales = rng.uniform(0.002, 0.02, (groups, N))
    zeros = offsets = None
    if kind.form in ("offsets", "scaled zeros"):
        zero = rng.uniform(2, 2**kind.bits - 3, scales.shape)
        zero = zero if kind.form == "offsets" else np.rint(zero)
        offsets = (-scales.astype(dtype).astype(np.float64) * zero).astype(dtype)
    if kind.form == "edges":
        w = rng.normal(0, 0.02, (groups, kind.group_size, N))
        low, high = w.min(1), w.max(1)
        down = -low > high
        edge = np.where(down, low, high)
        scales = edge / np.rint(edge / np.where(down, high - low, low - high) * (2**kind.bits - 1))
        offsets = edge.astype(dtype)
    if kind.form == "zeros":
        zeros = rng.integers(1, 2**kind.bits, scales.shape).astype(np.uint8)
    packed = codes.pack(rng.integers(0, 2**kind.bits, (K, N)).astype(np.uint8), kind.bits)
    return linear.build(
        packed, scales.astype(dtype), zeros, kind.bits, kind.group_size, K, N, "float32", offsets=offsets
    )


def _deviation(q: QuantizedTensor, format: Format) -> float | None:
    assert format.encoder is not None
    try:
        return pipeline.encode(format.encoder(Destination()), NAME, q, lossy=True).record.deviation
    except FormatError:
        return None


def _cell(deviation: float | None) -> str:
    if deviation is None:
        return "-"
    return "=" if deviation == 0 else f"{deviation:.1g}"
