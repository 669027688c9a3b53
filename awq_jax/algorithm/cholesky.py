"""The inverse of a Cholesky factor, and the solution of many small systems, made of products that XLA compiles.

LAPACK is not called: on a CPU its sums, and so the last bits of a factor, depend on how many threads it has, and those
spin between the short steps that a matrix of some thousand rows allows. Here every product has a short contraction,
whose order does not depend on threads.
"""

import math

import jax
import jax.numpy as jnp

BLOCK = 192  # most rows eliminated at once
ROWS = 96  # most rows eliminated one by one


def inverse_cholesky(a: jax.Array) -> jax.Array:
    """``L^-1`` of a positive definite ``a = L L^T``, float32 ``[K, K]``, lower triangular.

    Elimination of ``[a | 1]`` by blocks of rows (Golub and Van Loan, "Matrix Computations", 4.2.6 with the right sides
    ``1``): what makes ``L^T`` of the left half makes ``L^-1`` of the right one. NaN if ``a`` is not positive definite.
    """
    k = len(a)
    doublings = max(0, math.ceil(math.log2(k / BLOCK)))
    block = -(-k // 2**doublings)
    n = block * 2**doublings
    # Ones on the rest of the diagonal change nothing before it.
    a = jnp.pad(a, (0, n - k)) + jnp.diag((jnp.arange(n) >= k).astype(a.dtype))
    every = jnp.arange(n)

    # Both halves in one matrix: a column of the left half is last read when that of the right half gets its first
    # number other than 0. Above the blocks on the diagonal nothing is kept up to date.
    def eliminate(j: jax.Array, m: jax.Array) -> jax.Array:
        start = j * block
        inverse = inverse_of_block(jax.lax.dynamic_slice(m, (start, start), (block, block)))
        below = jax.lax.dynamic_slice(m, (0, start), (n, block)) @ inverse.T
        below = jnp.where(every[:, None] >= start + block, below, 0)  # of L
        before = inverse @ jnp.where(every < start, jax.lax.dynamic_slice(m, (start, 0), (block, n)), 0)  # of L^-1
        m = jax.lax.dynamic_update_slice(m, -below @ inverse, (0, start))
        m = jax.lax.dynamic_update_slice(m, jax.lax.dynamic_update_slice(before, inverse, (0, start)), (start, 0))
        right = before.T + below  # neither has numbers where the other one has them

        def less(i: jax.Array, j: jax.Array, m: jax.Array) -> jax.Array:
            at = i * block, j * block
            product = rows(below, at[0]) @ rows(right, at[1]).T
            return jax.lax.dynamic_update_slice(m, jax.lax.dynamic_slice(m, at, (block, block)) - product, at)

        return jax.lax.fori_loop(
            j + 1, n // block, lambda i, m: jax.lax.fori_loop(0, i + 1, lambda j, m: less(i, j, m), m), m
        )

    def rows(a: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(a, (first, 0), (block, block))

    return jax.lax.fori_loop(0, n // block, eliminate, a)[:k, :k]


def inverse_of_block(a: jax.Array) -> jax.Array:
    """As `inverse_cholesky`, in halves, and those one row after another."""
    k = len(a)
    if k > ROWS:
        half = k // 2
        first = inverse_of_block(a[:half, :half])
        below = a[half:, :half] @ first.T
        second = inverse_of_block(a[half:, half:] - below @ below.T)
        return jnp.block([[first, jnp.zeros_like(below.T)], [-second @ (below @ first), second]])
    rows = jnp.arange(k)[:, None]

    def step(i: jax.Array, m: jax.Array) -> jax.Array:
        root = jnp.sqrt(m[i, i])
        row = m[i] / root
        below = jnp.where(rows > i, m[:, i, None] / root, 0.0)
        return jnp.where(rows == i, row, m - below * row)

    return jax.lax.fori_loop(0, k, step, jnp.concatenate([a, jnp.eye(k, dtype=a.dtype)], axis=1))[:, k:]


def solve_each(a: jax.Array, b: jax.Array) -> jax.Array:
    """``x [G, N]`` with ``a[:, :, n] x[:, n] = b[:, n]`` for positive definite ``a [G, G, N]`` and ``b [G, N]``."""
    rows = jnp.arange(len(a))[:, None, None]

    def step(i: jax.Array, m: jax.Array) -> jax.Array:
        row = m[i] / m[i, i]
        return jnp.where(rows == i, row, m - m[:, i, None] * row)

    return jax.lax.fori_loop(0, len(a), step, jnp.concatenate([a, b[:, None]], axis=1))[:, -1]
