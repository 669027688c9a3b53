"""Compiled attention of single queries against NumPy in float64, with all instructions there are."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax.kernels import native_attention, native_build

HERE = native_build.target(native_attention.SYMBOL)
pytestmark = pytest.mark.skipif(isinstance(HERE, str), reason=f"no compiled kernel: {HERE}")

# Rows, slots, heads of keys, heads for each, channels of keys and of values, tokens of a slot, window.
CASES = (
    (6, 6, 3, 3, 64, 64, 320, None),
    (4, 8, 2, 5, 128, 64, 300, 40),
    (2, 3, 1, 8, 16, 48, 64, None),
    (5, 5, 2, 1, 32, 32, 1000, 130),
)


def arrays(rows, slots, groups, each, dim, value_dim, length, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(rows, groups * each, dim)).astype(np.float32)
    k = rng.normal(size=(slots, groups, length, dim)).astype(np.float32)
    v = rng.normal(size=(slots, groups, length, value_dim)).astype(np.float32)
    positions = rng.integers(0, length, rows).astype(np.int32)
    positions[0], positions[-1] = length, length - 1  # one row is not at work, another one's slot is full
    return q, k, v, np.int32(slots - rows), positions


def exact(q, k, v, first, positions, scale, window):
    """In float64, row by row."""
    each, out = q.shape[1] // k.shape[1], np.zeros((*q.shape[:2], v.shape[-1]))
    for b, position in enumerate(positions):
        if position == k.shape[2]:
            continue
        seen = slice(0 if window is None else max(0, position + 1 - window), position + 1)
        for h in range(q.shape[1]):
            scores = k[first + b, h // each, seen].astype(np.float64) @ q[b, h] * scale
            weights = np.exp(scores - scores.max())
            out[b, h] = weights @ v[first + b, h // each, seen] / weights.sum()
    return out


def check(case, level=""):
    *sizes, window = case
    given = arrays(*sizes)
    scale = 3 / sizes[4] ** 0.5  # sharp, so that the largest score is far from the others
    want = exact(*given, scale, window)
    assert native_attention.obstacle(*given[:3], level) is None

    @jax.jit
    def run(*arrays):
        return native_attention.attend(*arrays, scale=scale, window=window, otherwise=never, level=level)

    assert np.abs(run(*given) - want).max() < 2e-6 * np.abs(want).max()


def never(q, keys, values, first, positions):
    """What other platforms would run: wrong, and of the right shape."""
    return jnp.full((*q.shape[:2], values.shape[-1]), jnp.nan)


@pytest.mark.parametrize("case", CASES)
def test_against_float64(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("level", [level.name for level in native_build.levels()][1:])
@pytest.mark.parametrize("case", CASES)
def test_other_levels_against_float64(case, level):
    check(case, level)


def test_a_row_is_the_same_alone():
    """To the bit: nothing of a row depends on how many there are beside it, nor on how threads share the work."""
    q, k, v, _, positions = arrays(8, 8, 3, 3, 64, 64, 600)
    run = jax.jit(lambda *a: native_attention.attend(*a, scale=0.1, window=None, otherwise=never))
    together = np.asarray(run(q, k, v, np.int32(0), positions))
    for b in range(1, 8):
        assert np.array_equal(run(q[b : b + 1], k, v, np.int32(b), positions[b : b + 1])[0], together[b])


def test_what_is_not_finite_stays_in_its_row():
    q, k, v, first, positions = arrays(3, 3, 1, 2, 16, 16, 40)
    positions[:] = 9
    k[0, 0, 4], v[1, 0, 9] = np.nan, np.inf
    k[2, :, 10:], v[2, :, 10:] = np.nan, np.nan  # beyond what the row may see
    y = np.asarray(native_attention.attend(q, k, v, first, positions, scale=0.1, window=None, otherwise=never))
    assert np.isnan(y[0]).all()
    assert np.isinf(y[1]).all()
    assert np.isfinite(y[2]).all()


def test_what_it_does_not_take():
    q, k, v, *_ = arrays(2, 2, 1, 1, 24, 16, 8)
    assert "multiples of 16" in native_attention.obstacle(q, k, v)
    q, k, v, *_ = arrays(2, 2, 1, 1, 16, 16, 8)
    assert "float32" in native_attention.obstacle(q, k.astype(np.float16), v)


def test_other_platforms_and_exported_programs_have_the_other_form():
    given = arrays(2, 2, 1, 1, 16, 16, 8)
    run = jax.jit(lambda *a: native_attention.attend(*a, scale=0.1, window=None, otherwise=never))
    assert "awq_attention" in run.lower(*given).as_text()
    assert "awq_attention" not in jax.export.export(run, platforms=["tpu"])(*given).mlir_module()
    assert np.isnan(jax.export.export(run)(*given).call(*given)).all()
