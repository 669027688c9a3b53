"""The correction of weights for a changed input, against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax.algorithm import correction
from awq_jax.algorithm.correction import Moments

K, R, TOKENS = 12, 3, 40


def data(seed: int, drift: float, seqs: int = 4) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Inputs of the quantized and of the float model, and errors of the stream, by sequence."""
    rng = np.random.default_rng(seed)
    mix, move, push = rng.standard_normal((K, K)), rng.standard_normal((K, K)), rng.standard_normal((K, R))
    out = []
    for _ in range(seqs):
        a = rng.standard_normal((TOKENS, K)) @ mix
        noise = rng.standard_normal((TOKENS, K))
        out.append((a, a + drift * a @ move * 0.1 + 0.1 * noise, drift * a @ push + 0.1 * noise[:, :R]))
    return out


def moments(sequences) -> list[Moments]:
    return [Moments(*(jnp.asarray(m, jnp.float32) for m in (a.T @ a, a.T @ (b - a), a.T @ d))) for a, b, d in sequences]


def solved(sequences, w, lam, columns):
    """Both moves in float64: of the drift, and of the stream."""
    a, b, d = (np.concatenate(x) for x in zip(*sequences, strict=True))
    gram = a.T @ a
    diagonal = np.diag(gram)
    damped = gram + np.diag(lam * (diagonal + 0.1 * diagonal.mean()))
    aims = (a.T @ (b - a) @ w, a.T @ d[:, columns] * (columns >= 0))
    return [np.linalg.solve(damped, x) for x in aims]


def test_the_corrected_weight_solves_the_regression():
    sequences, rng = data(0, 1.0), np.random.default_rng(1)
    w, columns = rng.standard_normal((K, 5)), np.asarray([2, -1, 0, 1, 2])
    move, push = solved(sequences, w, 0.3, columns)
    total = Moments(*(sum(x) for x in zip(*moments(sequences), strict=True)))
    taken = correction.Strength(0.75, 0.5)
    prepared = correction.prepare(total)
    got = correction.corrected(jnp.asarray(w, jnp.float32), total, prepared, taken, columns.astype(np.int32))
    np.testing.assert_allclose(got, w + 0.75 * move + 0.5 * push, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("drift", "tried"), [(0.0, 4), (1.0, 4), (1.0, 1)])
def test_strengths_are_those_that_predict_sequences_left_out(drift, tried):
    sequences, rng = data(2, drift), np.random.default_rng(3)
    w, columns = rng.standard_normal((K, 4)), np.asarray([0, 1, 2, -1])
    every = moments(sequences)
    total = Moments(*(sum(x) for x in zip(*every, strict=True)))
    got = correction.strengths(total, every[:tried], jnp.asarray(w, jnp.float32), columns.astype(np.int32), 9)

    def left_out(alpha: float, rho: float) -> float:
        """The squared error on each sequence of what the others gave, less that of no correction."""
        found = 0.0
        for i, (a, b, d) in enumerate(sequences[:tried]):
            move, push = solved(sequences[:i] + sequences[i + 1 :], w, correction.LAM, columns)
            aim = (b - a) @ w + d[:, columns] * (columns >= 0)
            found += np.square(aim - a @ (alpha * move + rho * push)).sum() - np.square(aim).sum()
        return found

    grid = np.linspace(0, 1, 21)
    best = min(left_out(x, y) for x in grid for y in grid)
    found = left_out(*got)
    assert found <= best + 1e-3 * abs(best)
    if drift:
        assert got.alpha > 0.5
        assert got.rho > 0.5
        assert found < 0


def test_without_a_stream_and_without_any_drift_nothing_is_corrected():
    a = np.random.default_rng(4).standard_normal((TOKENS, K))
    still = [Moments(jnp.asarray(a.T @ a, jnp.float32), jnp.zeros((K, K)), jnp.zeros((K, 0)))] * 2
    assert (
        correction.strengths(Moments(*(2 * x for x in still[0])), still, jnp.ones((K, 2)), np.full(2, -1, np.int32), 2)
        == correction.NONE
    )


def test_columns_are_spread_evenly_and_once_each():
    assert correction.some_columns(3).tolist() == [0, 1, 2]
    some = correction.some_columns(1000)
    assert (len(some), some[0], some[-1]) == (correction.COLUMNS, 0, 999)
    assert set(np.diff(some)) <= {7, 8}


@pytest.mark.parametrize("here", [True, False])
def test_what_remains_is_how_far_results_are_from_the_float_model(here, monkeypatch):
    """By NumPy where the moments are in the host's memory, in pieces of rows; else by a program."""
    monkeypatch.setattr(correction, "ROWS", 5)
    if not here:
        monkeypatch.setattr(correction.host, "view", lambda array: None)
    (sequence,) = sequences = data(5, 1.0, 1)
    (sums,) = moments(sequences)
    a, b, d = sequence
    rng = np.random.default_rng(6)
    w, stored = rng.standard_normal((2, K, 4)).astype(np.float32)
    streamed = np.array([2, -1, 0, 1], np.int32)
    push = np.where(streamed >= 0, d[:, streamed], 0.0)
    gap = np.square((b - a) @ w + push).sum(axis=0).astype(np.float32)
    lost, own = correction.remaining(sums, gap, w, streamed, stored)
    np.testing.assert_allclose(lost, np.square(a @ stored - b @ w - push).sum(axis=0), rtol=1e-3)
    np.testing.assert_allclose(own, np.square(a @ w).sum(axis=0), rtol=1e-4)
