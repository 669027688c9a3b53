"""Rounding errors compensated in the weights not yet rounded (GPTQ, arXiv 2210.17323), and scales refitted to codes.

For one column, with ``d = rounded - w`` and H the mean Gram of the input, the expected squared output error is
``d^T H d``. Rows are rounded one after another, each from the value that earlier rows have moved it to. Let F be row k
and those still to come, and let rounding move row k by e. Rows rounded before k may be ignored: those of F are where,
given them, the error is least, so its gradient there is 0, and a move ``c`` of F adds ``c^T H_FF c`` with no term that
mixes c with the earlier errors. Of the moves with ``c_k = e`` the best is (OBQ; section 3 of the paper)

    c = e A[:, k] / A[k, k]   with   A = H_FF^-1,   which adds   e^2 / A[k, k].

One factorisation gives A for all k (section 4, step 3). Let ``H = R R^T`` with R upper triangular and ``U = R^-1``,
so that ``U^T U = H^-1``. R is upper triangular, hence ``H_FF = R_FF R_FF^T`` and ``A = U_FF^T U_FF``, whose column k
is ``U[k, k] U[k, F]``:

    c = e U[k, F] / U[k, k],   which adds   e^2 / U[k, k]^2.

The moves add up to ``d = U^T (e / diag U)``, so ``R^T d = e / diag U`` and ``d^T H d = sum_k e_k^2 / U[k, k]^2``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from awq_jax.algorithm.cholesky import inverse_cholesky, solve_each
from awq_jax.algorithm.grid import Grid, store

CHUNKS = 4  # see `_products_of_groups`
OUTER, INNER = 96, 16  # rows that are brought up to date at once, and those that every row updates


class GramFactor(NamedTuple):
    """What `compensate` needs of a Gram; see `factorize`.

    Attributes:
      order: int32 ``[K]``: channels in order of falling ``diag(gram)``.
      inverse: float32 ``[K, K]``: `inverse_factor` of the damped Gram in that order.
      damping: float32 ``[K]``: what was added to the diagonal of the Gram, by channel.
    """

    order: jax.Array
    inverse: jax.Array
    damping: jax.Array


def factorize(gram: jax.Array, damping: float) -> GramFactor:
    """The factor of a Gram ``[K, K]``, whose columns may then be compensated in any pieces."""
    added = damping_of(gram, damping)
    order = jnp.argsort(-jnp.diagonal(gram), stable=True)
    return GramFactor(order, inverse_factor((gram + jnp.diag(added))[order][:, order]), added)


def damping_of(gram: jax.Array, damping: float) -> jax.Array:
    """What is added to the diagonal of a Gram ``[K, K]`` before it is factored, ``[K]``.

    It is relative to each channel's own energy plus a small share of the mean, so that
    one channel a thousand times larger than the rest does not drown the others. Channels that were
    never active get the mean: they are rounded to nearest.
    """
    diag = jnp.diagonal(gram)
    mean = jnp.maximum(diag.mean(), 1e-30)
    return jnp.where(diag > 0, damping * (diag + 0.1 * mean), mean)


def inverse_factor(gram: jax.Array) -> jax.Array:
    """Upper-triangular ``U`` with ``U^T U = gram^-1``, of a positive definite ``gram``."""
    # With J the reversal of rows: J H J = L L^T (Cholesky), so H = R R^T for the upper triangular R = J L J, and
    # U = R^-1 = J L^-1 J.
    return inverse_cholesky(gram[::-1, ::-1])[::-1, ::-1]


def conditional_energy(gram: jax.Array, factor: GramFactor) -> jax.Array:
    """What compensation cannot take away from each channel, ``[K]``.

    With rows rounded in order of falling ``diag(gram)`` and every error spread over the rows still to
    come, the squared output error is ``sum_k energy_k * e_k**2`` with e the rounding error of row k:
    the energy is the variance of channel k given the channels rounded after it (the pivot of the
    factorisation ``U D U^T``), not the variance itself.
    """
    # Above: row k leaves e^2 / U[k, k]^2. In H = R R^T = (R / diag R) diag(R)^2 (R / diag R)^T the pivot is
    # R[k, k]^2 = 1 / U[k, k]^2 = H_kk - H_kL H_LL^-1 H_Lk, L the rows after k: what of channel k no linear
    # combination of the later ones explains.
    pivots = 1.0 / jnp.square(jnp.diagonal(factor.inverse))
    energy = jnp.zeros_like(pivots).at[factor.order].set(pivots)
    return jnp.where(jnp.diagonal(gram) > 0, energy, 0.0)


def compensate(w: jax.Array, factor: GramFactor, grid: Grid, bits: int) -> tuple[jax.Array, jax.Array]:
    """Round row by row, each error spread over the rows not yet rounded (arXiv 2210.17323).

    The grid is fixed beforehand, so the order of rows leaves no trace in the stored format.

    Args:
      w: ``[K, N]``.
      factor: of the Gram of what meets ``w``.
      grid: parameters per (group, column).

    Returns:
      codes float32 ``[K, N]``, and the expected squared output error of each column ``[N]`` by the Gram with its
      damping: it comes with the codes, without a product with the Gram (see above).
    """
    k, n = w.shape
    group = k // grid.scale.shape[0]
    order, u, _ = factor
    pad = -k % OUTER
    if pad:
        u = jnp.pad(u, ((0, pad), (0, pad))) + jnp.diag((jnp.arange(k + pad) >= k).astype(u.dtype))

    def ordered(a: jax.Array) -> jax.Array:
        return jnp.pad(a[order], ((0, pad), (0, 0)))

    scale, zero = (ordered(jnp.repeat(a, group, axis=0)) for a in grid)
    rest, top = ordered(w), 2**bits - 1
    part, put = jax.lax.dynamic_slice, jax.lax.dynamic_update_slice

    # Section 4, step 2, as a triangular system is solved: a block takes its share of all earlier steps when its turn
    # comes, by products as long as a block; within it, so does every smaller block.
    def outer(b: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        steps, codes = carry
        start = b * OUTER
        column = part(u, (0, start), (k + pad, OUTER))

        def earlier(j: jax.Array, rows: jax.Array) -> jax.Array:
            at = j * OUTER, 0
            return rows - part(column, at, (OUTER, OUTER)).T @ part(steps, at, (OUTER, n))

        rows = jax.lax.fori_loop(0, b, earlier, part(rest, (start, 0), (OUTER, n)))
        s, z = (part(a, (start, 0), (OUTER, n)) for a in (scale, zero))
        square = part(column, (start, 0), (OUTER, OUTER))

        def inner(j: jax.Array, c: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            rows, q, e = c
            at = j * INNER, 0
            later = part(square, at, (INNER, OUTER))
            own = part(later, (0, j * INNER), (INNER, INNER))
            r, s_j, z_j = (part(a, at, (INNER, n)) for a in (rows, s, z))
            q_j, e_j = _row_by_row(r, s_j, z_j, own, top)
            return rows - later.T @ e_j, put(q, q_j, at), put(e, e_j, at)

        nothing = jnp.zeros_like(rows)
        _, q, e = jax.lax.fori_loop(0, OUTER // INNER, inner, (rows, nothing, nothing))
        return put(steps, e, (start, 0)), put(codes, q, (start, 0))

    nothing = jnp.zeros_like(rest)
    steps, codes = jax.lax.fori_loop(0, (k + pad) // OUTER, outer, (nothing, nothing))
    return jnp.zeros((k, n), jnp.float32).at[order].set(codes[:k]), jnp.square(steps).sum(axis=0)


def _row_by_row(
    rows: jax.Array, scale: jax.Array, zero: jax.Array, u: jax.Array, top: int
) -> tuple[jax.Array, jax.Array]:
    """Codes and steps ``[R, N]`` of some rows, with ``u [R, R]`` among them."""

    def row(i: jax.Array, c: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        rows, q, steps = c
        w_i, s_i, z_i = rows[i], scale[i], zero[i]
        q_i = jnp.clip(jnp.round(w_i / jnp.where(s_i > 0, s_i, 1.0)) + z_i, 0, top)
        step = (w_i - (q_i - z_i) * s_i) / u[i, i]
        # w_F += c with e = -(w - rounded), so step = -e / U[k, k]. u is upper triangular: rounded rows stay.
        return rows - u[i][:, None] * step[None, :], q.at[i].set(q_i), steps.at[i].set(step)

    nothing = jnp.zeros_like(rows)
    _, q, steps = jax.lax.fori_loop(0, len(rows), row, (rows, nothing, nothing))
    return q, steps


class Refitted(NamedTuple):
    """See `refit`.

    Attributes:
      grid: with the new scales.
      change: float32 ``[N]``: what they add to each column's loss.
    """

    grid: Grid
    change: jax.Array


def refit(meets: jax.Array, gram: jax.Array, codes: jax.Array, grid: Grid, dtype: str) -> Refitted:
    """Least-squares scales for codes that are already chosen.

    For column n, ``dequantized = sum_G scale_G * (codes - zero)_G``: a G-dimensional quadratic in the
    scales with a closed-form minimum. Groups whose new scale would not stay within a factor of two
    keep the old one.

    Args:
      meets: ``gram @ w`` ``[K, N]``.
    """
    # dequantized = B s, column G of B [K, G] being codes - zero in the rows of group G and 0 elsewhere. With
    # a = B^T H B [G, G] the loss (B s - w)^T H (B s - w) has the gradient 2 (a s - B^T H w) and the second derivative
    # 2 a: s moves by -a^-1 (a s - B^T H w).
    k, n = codes.shape
    groups = len(grid.scale)
    size = k // groups
    base = codes.reshape(groups, size, n) - grid.zero[:, None]
    a = _products_of_groups(base, gram)
    slope = (a * grid.scale).sum(axis=1) - (base * meets.reshape(base.shape)).sum(axis=1)  # [G, N]
    # A little of |s - old|^2 is added: a group with no say in the error (a singular a) keeps its scale.
    floor = 1e-4 * jnp.einsum("GGn->Gn", a).mean(axis=0) + 1e-30
    solved = grid.scale - solve_each(a + jnp.eye(groups, dtype=a.dtype)[:, :, None] * floor, slope)
    ok = (solved > 0.5 * grid.scale) & (solved < 2.0 * grid.scale)
    new = Grid(store(jnp.where(ok, solved, grid.scale), dtype), grid.zero)
    moved = new.scale - grid.scale
    return Refitted(new, ((2 * slope + (a * moved[:, None]).sum(axis=0)) * moved).sum(axis=0))


def _products_of_groups(base: jax.Array, gram: jax.Array) -> jax.Array:
    """``a [G, G, N]``: for each column the products, by ``gram [K, K]``, of its groups ``base [G, g, N]``."""
    # a is symmetric. A group is multiplied with those of its own chunk of groups and of the following chunks: of four
    # chunks, 5/8 of the work. One group at a time: all at once would take K x G numbers for each column.
    groups, size, n = base.shape
    chunk = -(-groups // CHUNKS)
    chunks = -(-groups // chunk)
    filled = chunks * chunk
    base = jnp.pad(base, ((0, filled - groups), (0, 0), (0, 0)))
    gram = jnp.pad(gram, ((0, (filled - groups) * size),) * 2)

    def of_group(i: jax.Array, a: jax.Array) -> jax.Array:
        def with_chunk(c: jax.Array, a: jax.Array) -> jax.Array:
            block = jax.lax.dynamic_slice(gram, (c * chunk * size, i * size), (chunk * size, size))
            others = jax.lax.dynamic_slice_in_dim(base, c * chunk, chunk)
            products = (others * (block @ base[i]).reshape(others.shape)).sum(axis=1)
            return jax.lax.dynamic_update_slice(a, products[None], (i, c * chunk, 0))

        return jax.lax.fori_loop(i // chunk, chunks, with_chunk, a)

    a = jax.lax.fori_loop(0, groups, of_group, jnp.zeros((filled, filled, n), base.dtype))[:groups, :groups]
    return jnp.where(jnp.tri(groups, dtype=bool)[:, :, None], a.swapaxes(0, 1), a)
