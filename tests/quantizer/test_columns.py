"""Weights a few columns at a time, against the whole leaf handled in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax.devices.pool import Pool
from awq_jax.plan.fold import ScaleStep
from awq_jax.quantizer import column_pieces
from awq_jax.quantizer.column_pieces import CanonicalWeight, Columns, sweep

rng = np.random.default_rng(0)


def canonical(leaf: np.ndarray, axes: str, scan: int, experts: int) -> np.ndarray:
    """``[S, E, K, N]`` by one einsum over named axes."""
    order = [i for r in "bkn" for i, a in enumerate(axes) if a == r]
    w = leaf.transpose(order)
    k = int(np.prod([n for n, a in zip(leaf.shape, axes, strict=True) if a == "k"]))
    n = int(np.prod([n for n, a in zip(leaf.shape, axes, strict=True) if a == "n"]))
    w = w.reshape(scan, experts, -1, k, n)
    return np.concatenate([w[:, :, i] for i in range(w.shape[2])], axis=-1)


@pytest.mark.parametrize(
    ("shape", "axes", "scan", "experts"),
    [
        ((12, 10), "kn", 1, 1),
        ((10, 12), "nk", 1, 1),
        ((3, 12, 2, 5), "bknn", 3, 1),
        ((2, 3, 12, 10), "bbkn", 2, 3),
        ((3, 12, 10), "bkn", 1, 1),  # experts that share an activation: their columns stand side by side
        ((5, 4, 3, 2), "nknk", 1, 1),
    ],
)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_columns_are_those_of_the_whole_leaf(shape, axes, scan, experts, offset):
    leaf = rng.normal(size=shape).astype(np.float32)
    times, over = (rng.uniform(1, 2, [1 if i % 2 else n for i, n in enumerate(shape)]) for _ in range(2))
    steps = ("over", offset, over), ("times", 0.0, times)
    factors = tuple(ScaleStep(kind, offset, jnp.asarray(values, jnp.float32)) for kind, offset, values in steps)
    part = CanonicalWeight(jnp.asarray(leaf), axes, scan, experts, factors)
    want = canonical((((offset + leaf) / over - offset) * times).astype(np.float32), axes, scan, experts)
    assert part.columns == want.shape[-1]
    for s, e in np.ndindex(scan, experts):
        got = part.take(s, e, 3, 5)
        np.testing.assert_allclose(got, want[s, e, :, 3:8], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(got, part.take_compiled(s, e, 3, 5))  # to the bit, by NumPy or on a device
    np.testing.assert_allclose(part.largest(), np.abs(want).max(), rtol=1e-5)
    assert part.largest() == part.largest_compiled()


def test_pieces_run_over_the_borders_of_weights_and_are_filled_up(monkeypatch):
    monkeypatch.setattr(column_pieces, "PIECE", {jax.default_backend(): 16 * 4})
    monkeypatch.setattr(column_pieces, "ALIGNED", 4)
    leaves = [rng.normal(size=(12, n)).astype(np.float32) for n in (5, 1, 8)]
    side = Columns([CanonicalWeight(jnp.asarray(w), "kn") for w in leaves], rows=16)
    assert (side.total, side.pieces, side.size) == (14, 4, 4)  # 16 columns for 14
    pieces = [side.piece(0, 0, i) for i in range(side.pieces)]
    assert {p.shape for p in pieces} == {(16, 4)}
    whole = np.concatenate(pieces, axis=1)
    np.testing.assert_array_equal(whole[:12, :14], np.concatenate(leaves, axis=1))
    assert not whole[12:].any()
    assert not whole[:, 14:].any()


def test_a_piece_takes_no_memory_for_the_rest_of_the_leaf():
    """Scaling, transposing and converting happen on the columns that are wanted, not on all."""
    leaf = jax.ShapeDtypeStruct((4096, 512), jnp.bfloat16)
    step = ScaleStep("times", 0.0, jax.ShapeDtypeStruct((1, 512), jnp.float32))
    weight = CanonicalWeight(leaf, "nk", steps=(step,))
    compiled = CanonicalWeight.take_compiled.lower(weight, 0, 0, 0, size=64).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 512 * 64 * 4


@pytest.mark.parametrize("devices", [0, 1])
def test_a_sweep_returns_results_by_expert_and_piece(devices):
    seen = []

    def fetch(e):
        seen.append(e)
        return np.float32(e)

    pool = Pool(tuple(jax.devices()[:devices]))
    got = sweep(pool, 3, 2, fetch, lambda x: x * 10, lambda place, e, i, given: place(given) + i)
    assert seen == [0, 1, 2]
    assert [[float(x) for x in row] for row in got] == [[0, 1], [10, 11], [20, 21]]
