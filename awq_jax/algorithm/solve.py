"""Solution of systems with a positive definite matrix, by its Cholesky factor in blocks.

As in `awq_jax.algorithm.cholesky` LAPACK is not called, and every product is short, so that no sum depends on threads.
The inverse of the factor, which costs twice as much as the factor, is made for the blocks on its diagonal only.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from awq_jax.algorithm.cholesky import BLOCK, inverse_of_block


class Blocks(NamedTuple):
    """A Cholesky factor ``L [n, n]``, n a multiple of the size of its blocks.

    Attributes:
      below: float32 ``[n, n]``: L below the blocks on its diagonal.
      inverse: float32 ``[n / block, block, block]``: the inverses of those.
    """

    below: jax.Array
    inverse: jax.Array


def factor(a: jax.Array) -> Blocks:
    """Of ``a = L L^T``, float32 ``[K, K]`` (Golub and Van Loan, "Matrix Computations", 4.2.6).

    Rows up to a multiple of the block are those of the unit matrix. NaN if ``a`` is not positive definite.
    """
    k = len(a)
    count = math.ceil(k / BLOCK)
    block = -(-k // count)
    n = block * count
    a = jnp.pad(a, (0, n - k)) + jnp.diag((jnp.arange(n) >= k).astype(a.dtype))
    every = jnp.arange(n)[:, None]

    def eliminate(j: jax.Array, c: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        m, inverses = c
        start = j * block
        inverse = inverse_of_block(jax.lax.dynamic_slice(m, (start, start), (block, block)))
        column = jax.lax.dynamic_slice(m, (0, start), (n, block)) @ inverse.T
        column = jnp.where(every >= start + block, column, 0)

        def less(i: jax.Array, l: jax.Array, m: jax.Array) -> jax.Array:
            at = i * block, l * block
            product = _rows(column, at[0], block) @ _rows(column, at[1], block).T
            return jax.lax.dynamic_update_slice(m, jax.lax.dynamic_slice(m, at, (block, block)) - product, at)

        m = jax.lax.dynamic_update_slice(m, column, (0, start))
        m = jax.lax.fori_loop(
            j + 1, count, lambda i, m: jax.lax.fori_loop(j + 1, i + 1, lambda l, m: less(i, l, m), m), m
        )
        return m, inverses.at[j].set(inverse)

    return Blocks(*jax.lax.fori_loop(0, count, eliminate, (a, jnp.zeros((count, block, block), a.dtype))))


def solve(factor: Blocks, right: jax.Array) -> jax.Array:
    """``a^-1 right``, ``[K, C]``."""
    k = len(right)
    count, block, _ = factor.inverse.shape
    right = jnp.pad(right, ((0, count * block - k), (0, 0)))

    def part(i: jax.Array, j: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(factor.below, (i * block, j * block), (block, block))

    def forward(j: jax.Array, x: jax.Array) -> jax.Array:
        def less(i: jax.Array, rest: jax.Array) -> jax.Array:
            return rest - part(j, i) @ _rows(x, i * block, block)

        rest = jax.lax.fori_loop(0, j, less, _rows(x, j * block, block))
        return jax.lax.dynamic_update_slice(x, factor.inverse[j] @ rest, (j * block, 0))

    def back(t: jax.Array, x: jax.Array) -> jax.Array:
        j = count - 1 - t

        def less(i: jax.Array, rest: jax.Array) -> jax.Array:
            return rest - part(i, j).T @ _rows(x, i * block, block)

        rest = jax.lax.fori_loop(j + 1, count, less, _rows(x, j * block, block))
        return jax.lax.dynamic_update_slice(x, factor.inverse[j].T @ rest, (j * block, 0))

    x = jax.lax.fori_loop(0, count, forward, right)
    return jax.lax.fori_loop(0, count, back, x)[:k]


def _rows(a: jax.Array, first: jax.Array, count: int) -> jax.Array:
    return jax.lax.dynamic_slice(a, (first, 0), (count, a.shape[1]))
