"""Rounding of one matrix against NumPy in float64, and on the inputs that broke other quantizers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_rounding import correlated, gram_of, plain

from awq_jax.algorithm import clipping, compensation, methods
from awq_jax.algorithm import grid as rounding
from awq_jax.algorithm.descent import descend
from awq_jax.algorithm.round_matrix import round_matrix
from awq_jax.config import METHOD_NAMES, LeafConfig

K, N, G = 32, 6, 16
rng = np.random.default_rng(0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [G, K])
def test_nearest_matches_numpy(bits: int, symmetric: bool, group: int) -> None:
    w = rng.normal(size=(K, N)).astype(np.float32)
    got = rounding.quantize_dequantize(jnp.asarray(w), group, bits, symmetric, "float16")
    np.testing.assert_allclose(got, plain(w, group, bits, symmetric), rtol=0, atol=1e-6)


def test_symmetric_grid_covers_both_ends_within_half_a_step() -> None:
    w = jnp.asarray([[-1.0], [0.9], [0.1], [0.0]])[None]
    grid = rounding.make_grid(*rounding.range_of(w), 4, True, "float32")
    error = jnp.abs(rounding.decode(rounding.encode(w, grid, 4), grid) - w)
    assert float(error.max()) <= 0.5 * float(grid.scale[0, 0]) + 1e-7


def test_column_loss_is_the_mean_squared_output_error() -> None:
    x = correlated()
    delta = rng.normal(size=(K, N)).astype(np.float32)
    want = np.square(x.astype(np.float64) @ delta).mean(axis=0)
    np.testing.assert_allclose(
        rounding.column_loss(jnp.asarray(delta), jnp.asarray(gram_of(x), jnp.float32)), want, rtol=1e-4
    )


def test_clip_search_is_as_good_as_a_trial_of_all_pairs() -> None:
    """Never worse than any pair of even numbers of steps, and on average within 3 % of the best pair of all."""
    w = rng.normal(size=(K, 16 * N)).astype(np.float32)
    w[3, 2] = 6.0
    h = gram_of(correlated())
    wg = jnp.asarray(w).reshape(-1, G, w.shape[1])
    blocks = clipping.diagonal_blocks(jnp.asarray(h, jnp.float32), G)
    for i in range(K // G):
        np.testing.assert_allclose(blocks[i], h[i * G : (i + 1) * G, i * G : (i + 1) * G], rtol=1e-6)
    got = clipping.clip_search(wg, blocks, 3, False, "float16")
    found = best = 0.0
    for g in range(K // G):
        hb = h[g * G : (g + 1) * G, g * G : (g + 1) * G]
        for n in range(w.shape[1]):
            part = w[g * G : (g + 1) * G, n].astype(np.float64)
            losses = np.empty((10, 10))
            by_grid = {}
            for a, b in np.ndindex(10, 10):
                low, high = min(part.min(), 0) * (1 - 0.05 * a), max(part.max(), 0) * (1 - 0.05 * b)
                scale = float(np.float16((high - low) / 7))
                zero = np.clip(np.rint(-low / scale), 0, 7)
                d = (np.clip(np.rint(part / scale) + zero, 0, 7) - zero) * scale - part
                losses[a, b] = by_grid[scale, zero] = d @ hb @ d
            chosen = by_grid[float(got.scale[g, n]), float(got.zero[g, n])]
            assert chosen <= losses[::2, ::2].min() * (1 + 1e-4)
            found, best = found + chosen, best + losses.min()
    assert found <= 1.03 * best


def test_inverse_factor_is_the_cholesky_factor_of_the_inverse() -> None:
    h = gram_of(correlated())
    damped = h + np.diag(0.01 * (np.diag(h) + 0.1 * np.diag(h).mean()))
    u = np.asarray(compensation.inverse_factor(jnp.asarray(damped, jnp.float32)), np.float64)
    assert np.allclose(u, np.triu(u))
    np.testing.assert_allclose(u.T @ u @ damped, np.eye(K), atol=1e-3)


@pytest.mark.parametrize("k", [K, 160])  # 160 rows: a second, partly empty block
def test_compensation_matches_a_plain_float64_loop(k: int) -> None:
    w = np.random.default_rng(3).normal(size=(k, N)).astype(np.float32)
    h = gram_of(correlated(k))
    grid = rounding.make_grid(*rounding.range_of(jnp.asarray(w).reshape(-1, G, N)), 3, False, "float16")
    factor = compensation.factorize(jnp.asarray(h, jnp.float32), 0.01)
    got, loss = compensation.compensate(jnp.asarray(w), factor, grid, 3)

    order = np.argsort(-np.diag(h), kind="stable")
    damped = h + np.diag(0.01 * (np.diag(h) + 0.1 * np.diag(h).mean()))
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    scale = np.repeat(np.asarray(grid.scale, np.float64), G, 0)[order]
    zero = np.repeat(np.asarray(grid.zero, np.float64), G, 0)[order]
    rest, codes = w[order].astype(np.float64), np.zeros((k, N))
    for i in range(k):  # the textbook form: remove row i from the inverse after rounding it
        codes[i] = np.clip(np.rint(rest[i] / scale[i]) + zero[i], 0, 7)
        error = (rest[i] - (codes[i] - zero[i]) * scale[i]) / inverse[i, i]
        rest -= inverse[:, i : i + 1] * error
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    want = np.zeros((k, N))
    want[order] = codes
    assert (np.asarray(got) == want).mean() > 0.995  # float32 may fall on the other side of a half
    delta = np.asarray(rounding.error_of(got, grid, jnp.asarray(w)), np.float64)
    np.testing.assert_allclose(loss, np.einsum("kn,kj,jn->n", delta, damped, delta), rtol=1e-3)


def test_conditional_energy_predicts_the_error_that_compensation_leaves() -> None:
    """Against the definition (variance given the rows that come later) and against compensation itself."""
    h = gram_of(correlated())
    damped = h + np.diag(0.01 * (np.diag(h) + 0.1 * np.diag(h).mean()))
    order = np.argsort(-np.diag(h), kind="stable")
    gram = jnp.asarray(h, jnp.float32)
    factor = compensation.factorize(gram, 0.01)
    got = np.asarray(compensation.conditional_energy(gram, factor))
    for place, k in enumerate(order):
        later = order[place + 1 :]
        cross = damped[np.ix_([k], later)]
        want = (
            damped[k, k] - (cross @ np.linalg.solve(damped[np.ix_(later, later)], cross.T)).item()
            if len(later)
            else damped[k, k]
        )
        np.testing.assert_allclose(got[k], want, rtol=2e-3)
    w = np.random.default_rng(3).normal(size=(K, 400)).astype(np.float32)
    low, high = rounding.range_of(jnp.asarray(w).reshape(-1, G, 400))
    grid = rounding.make_grid(1.4 * low, 1.4 * high, 4, False, "float16")  # wide: nothing is clamped
    codes, _ = compensation.compensate(jnp.asarray(w), factor, grid, 4)
    delta = rounding.decode(codes.reshape(-1, G, 400), grid).reshape(K, 400) - w
    left = float(rounding.column_loss(delta, jnp.asarray(damped, jnp.float32)).mean())
    step = np.square(np.repeat(np.asarray(grid.scale), G, 0)).mean(axis=1) / 12
    assert 0.9 < left / (got * step).sum() < 1.1


def test_refit_is_the_least_squares_optimum() -> None:
    w = rng.normal(size=(K, N)).astype(np.float32)
    h = gram_of(correlated())
    grid = rounding.make_grid(*rounding.range_of(jnp.asarray(w).reshape(-1, G, N)), 3, False, "float32")
    codes = rounding.encode(jnp.asarray(w).reshape(-1, G, N), grid, 3).reshape(K, N)
    gram = jnp.asarray(h, jnp.float32)
    got, change = compensation.refit(gram @ w, gram, codes, grid, "float32")
    root = np.linalg.cholesky(h).T
    for n in range(N):
        base = (np.asarray(codes)[:, n] - np.repeat(np.asarray(grid.zero)[:, n], G)).astype(np.float64)
        design = np.stack([np.where(np.arange(K) // G == g, base, 0.0) for g in range(K // G)], axis=1)
        best, *_ = np.linalg.lstsq(root @ design, root @ w[:, n].astype(np.float64), rcond=None)

        def loss(s, d=design, n=n):
            return np.square(root @ (d @ s - w[:, n])).sum()

        before, after = loss(np.asarray(grid.scale)[:, n]), loss(np.asarray(got.scale)[:, n])
        assert after <= before
        np.testing.assert_allclose(change[n], after - before, atol=1e-4 * before)
        np.testing.assert_allclose(got.scale[:, n], best, rtol=2e-3)


def hard_weights() -> np.ndarray:
    w = np.random.default_rng(5).normal(size=(K, N)).astype(np.float32)
    w[:G, 0] = 0.0  # an all-zero group
    w[:, 1] = 0.0  # an all-zero column
    w[:G, 2] = np.linspace(1.0, 1.1, G)  # a group far from zero
    w[:, 3] = 1.1  # constant
    w[4] *= 1000.0  # one channel dwarfs the rest
    w[:G, 4] *= 1e-7
    return w


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_hard_inputs_are_finite_and_no_column_is_worse_than_nearest(
    bits: int, compensated: bool, symmetric: bool
) -> None:
    w = hard_weights()
    x = correlated()
    x[:, 7] = 0.0  # a dead channel
    x[:, 9] *= 1000.0
    h = gram_of(x)
    leaf = LeafConfig(bits, G, symmetric)
    gram = jnp.asarray(h, jnp.float32)
    rounder = methods.Compensated() if compensated else methods.Nearest()
    factor = rounder.prepare(gram, 0.01)
    r = round_matrix(jnp.asarray(w), gram, factor, rounder=rounder, leaf=leaf, clip=True, dtype="float16")
    for a in jax.tree.leaves(r):
        assert np.isfinite(np.asarray(a, np.float64)).all()
    assert float(r.scale.min()) > 0
    zero = np.repeat(np.asarray(r.zero, np.float64), G, 0)
    back = (np.asarray(r.codes, np.float64) - zero) * np.repeat(np.asarray(r.scale, np.float64), G, 0)
    loss = np.einsum("kn,kj,jn->n", back - w, h, back - w)
    np.testing.assert_allclose(r.energy, np.einsum("kn,kj,jn->n", w, h, w.astype(np.float64)), rtol=1e-4)
    nearest = plain(w, G, bits, symmetric) - w
    rtn = np.einsum("kn,kj,jn->n", nearest, h, nearest)
    assert (loss <= rtn * (1 + 1e-3) + 1e-9).all()
    assert (back[:, 1] == 0).all()
    assert (back[:G, 0] == 0).all()


def test_a_group_far_from_zero_survives() -> None:
    """A grid without 0 in its range and a clamped zero point returns 0.1 for weights of 1.1."""
    w = jnp.asarray(np.linspace(1.0, 1.1, G, dtype=np.float32)[:, None])
    got = rounding.quantize_dequantize(w, G, 4, False, "float16")
    assert float(jnp.abs(got - w).max()) < 0.04


def test_every_name_of_a_method_says_what_it_is() -> None:
    assert tuple(methods.METHODS) == METHOD_NAMES


@pytest.mark.parametrize("k", [K, 160])
def test_descent_matches_a_plain_float64_loop(k: int) -> None:
    w = np.random.default_rng(3).normal(size=(k, N)).astype(np.float32)
    h = gram_of(correlated(k))
    h[:, 5] = h[5] = 0  # a channel that was never active keeps its codes
    grid = rounding.make_grid(*rounding.range_of(jnp.asarray(w).reshape(-1, G, N)), 3, False, "float16")
    codes = rounding.encode(jnp.asarray(w).reshape(-1, G, N), grid, 3).reshape(k, N)
    error = rounding.error_of(codes, grid, jnp.asarray(w))
    scale = np.repeat(np.asarray(grid.scale, np.float64), G, 0)
    want, delta = np.asarray(codes, np.float64), np.asarray(error, np.float64)

    def loss(delta: np.ndarray) -> np.ndarray:
        return np.einsum("kn,kj,jn->n", delta, h, delta)

    got, change = codes, jnp.zeros(N)
    start = before = loss(delta)
    for _ in range(2):
        for i in range(k):
            if h[i, i] > 0:
                best = np.rint(want[i] - h[i] @ delta / h[i, i] / scale[i])
                delta[i] += (np.clip(best, 0, 7) - want[i]) * scale[i]
                want[i] = np.clip(best, 0, 7)
        error = rounding.error_of(got, grid, jnp.asarray(w))
        got, more = descend(got, error, jnp.asarray(h, jnp.float32), grid, 3)
        change += more
        assert (np.asarray(got) == want).mean() > 0.995
        found = loss(np.asarray(rounding.error_of(got, grid, jnp.asarray(w)), np.float64))
        np.testing.assert_allclose(start + change, found, rtol=1e-3)
        assert (found <= before * (1 + 1e-6)).all()
        before = found
    assert before.sum() < 0.8 * start.sum()
