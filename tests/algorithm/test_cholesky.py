"""Inverse factors and small systems against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax.algorithm import cholesky


def positive_definite(k: int, seed: int) -> np.ndarray:
    """float64 ``[k, k]``, with channels of very different size."""
    r = np.random.default_rng(seed)
    x = r.normal(size=(2 * k, k)) * np.exp(r.normal(size=k))
    return (x.T @ x / len(x)).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize(
    ("k", "block", "rows"),
    [(1, 192, 96), (7, 192, 96), (7, 192, 3), (40, 10, 96), (53, 8, 3)],
    ids=["one", "rows", "halves", "blocks", "blocks that are filled up"],
)
def test_the_inverse_of_the_factor(k: int, block: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "BLOCK", block)
    monkeypatch.setattr(cholesky, "ROWS", rows)
    a = positive_definite(k, seed=k)
    got = np.asarray(cholesky.inverse_cholesky(jnp.asarray(a, jnp.float32)))
    want = np.linalg.inv(np.linalg.cholesky(a))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert (np.triu(got, 1) == 0).all()


def test_what_is_not_positive_definite_is_nan() -> None:
    a = np.diag([1.0, -1.0, 1.0]).astype(np.float32)
    got = np.asarray(cholesky.inverse_cholesky(jnp.asarray(a)))
    assert np.isnan(np.diagonal(got)).all()


def test_each_system_is_solved() -> None:
    a = np.stack([positive_definite(9, seed=i) for i in range(5)], axis=-1)
    b = np.random.default_rng(1).normal(size=(9, 5))
    got = cholesky.solve_each(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    want = np.stack([np.linalg.solve(a[..., i], b[:, i]) for i in range(5)], axis=-1)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
