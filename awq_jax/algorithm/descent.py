"""Codes improved one by one, all others as they are: coordinate descent on the squared output error.

With ``d = decoded - w`` and H the Gram of the input, a column's error ``d^T H d`` is a parabola in the value of row i,
least at ``decoded_i - (H d)_i / H_ii``: the code nearest to that is the best one there is for that row. Compensation
chooses a code before it knows those of later rows; here all of them are known. No step raises the error.

One pass after each of the two times that a matrix is rounded: stories15M, 3 bits, 64 x 256 tokens, KL of 10,240 others
.232 without, .217 so, .218 with two passes each time, .222 with two after the second time alone (paired errors .003).
"""

import jax
import jax.numpy as jnp

from awq_jax.algorithm.compensation import INNER, OUTER
from awq_jax.algorithm.grid import Grid


def descend(codes: jax.Array, error: jax.Array, gram: jax.Array, grid: Grid, bits: int) -> tuple[jax.Array, jax.Array]:
    """Better codes on the same grid: one pass over all rows.

    Args:
      codes: float32 ``[K, N]``.
      error: what they stand for less the weights, float32 ``[K, N]``.
      gram: float32 ``[K, K]``.
      grid: of every (group, column).

    Returns:
      Codes float32 ``[K, N]``, and by how much the loss ``d^T gram d`` of each column has changed, ``[N]``, never
      above 0 but for rounding.
    """
    k, n = codes.shape
    group, pad = k // grid.scale.shape[0], -k % OUTER
    filled = k + pad

    def fill(a: jax.Array) -> jax.Array:
        return jnp.pad(a, ((0, pad), (0, 0)))

    h = jnp.pad(gram, ((0, pad), (0, pad)))
    scale, zero = (fill(jnp.repeat(a, group, axis=0)) for a in grid)
    top = 2**bits - 1
    part, put = jax.lax.dynamic_slice, jax.lax.dynamic_update_slice

    def outer(b: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, d, gained = carry
        start = b * OUTER
        column = part(h, (0, start), (filled, OUTER))

        # The slope of these rows: by products as long as a block, whose sums do not depend on threads.
        def of_block(j: jax.Array, slope: jax.Array) -> jax.Array:
            at = j * OUTER, 0
            return slope + part(column, at, (OUTER, OUTER)).T @ part(d, at, (OUTER, n))

        slope = jax.lax.fori_loop(0, filled // OUTER, of_block, jnp.zeros((OUTER, n), d.dtype))
        square = part(column, (start, 0), (OUTER, OUTER))
        s, z, q_b, d_b = (part(a, (start, 0), (OUTER, n)) for a in (scale, zero, q, d))

        def inner(j: jax.Array, c: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            slope, q_b, d_b, gained = c
            at = j * INNER, 0
            later = part(square, at, (INNER, OUTER))
            own = part(later, (0, j * INNER), (INNER, INNER))
            slope_j, q_j, s_j, z_j = (part(a, at, (INNER, n)) for a in (slope, q_b, s, z))
            q_j, moved, less = _row_by_row(slope_j, q_j, s_j, z_j, own, top)
            d_j = part(d_b, at, (INNER, n)) + moved
            return slope + later.T @ moved, put(q_b, q_j, at), put(d_b, d_j, at), gained + less

        _, q_b, d_b, gained = jax.lax.fori_loop(0, OUTER // INNER, inner, (slope, q_b, d_b, gained))
        return put(q, q_b, (start, 0)), put(d, d_b, (start, 0)), gained

    begin = fill(codes), fill(error), jnp.zeros(n, jnp.float32)
    q, _, gained = jax.lax.fori_loop(0, filled // OUTER, outer, begin)
    return q[:k], gained


def _row_by_row(
    slope: jax.Array, q: jax.Array, scale: jax.Array, zero: jax.Array, h: jax.Array, top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes and moves of some rows ``[R, N]``, and the change of the loss ``[N]``; ``h [R, R]``: the Gram of them."""

    def row(i: jax.Array, c: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slope, q, moves, gained = c
        s_i, z_i, q_i, slope_i, h_i = scale[i], zero[i], q[i], slope[i], h[i, i]
        live = (s_i > 0) & (h_i > 0)
        wanted = (q_i - z_i) - slope_i / jnp.where(live, h_i * s_i, 1.0)
        better = jnp.where(live, jnp.clip(jnp.round(wanted) + z_i, 0, top), q_i)
        move = (better - q_i) * s_i
        gained = gained + move * (2 * slope_i + h_i * move)
        return slope + h[i][:, None] * move[None, :], q.at[i].set(better), moves.at[i].set(move), gained

    nothing = jnp.zeros_like(slope)
    begin = slope, q, nothing, jnp.zeros(slope.shape[1], slope.dtype)
    _, q, moves, gained = jax.lax.fori_loop(0, len(slope), row, begin)
    return q, moves, gained
