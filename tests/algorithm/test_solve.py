"""Solutions by a Cholesky factor in blocks, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax.algorithm import solve


@pytest.mark.parametrize("k", [1, 5, 193, 400])
def test_solutions_are_those_of_float64(k):
    rng = np.random.default_rng(k)
    x, right = rng.standard_normal((2 * k, k)), rng.standard_normal((k, 3))
    a = x.T @ x + 0.1 * k * np.eye(k)
    got = jax.jit(lambda a, b: solve.solve(solve.factor(a), b))(jnp.asarray(a, jnp.float32), right.astype(np.float32))
    want = np.linalg.solve(a, right)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_what_is_not_positive_definite_has_no_number_for_an_answer():
    a = jnp.asarray(np.diag([1.0, -1.0, 2.0]), jnp.float32)
    assert np.isnan(np.asarray(solve.solve(solve.factor(a), jnp.ones((3, 1))))).any()
