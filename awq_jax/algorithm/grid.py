"""Groupwise affine rounding of one weight matrix: parameters, clipping, compensation.

Everything here knows arrays only. ``w`` is float32 ``[K, N]`` with K a multiple of the group
size g and ``G = K // g``; ``gram`` is ``E[x^T x]`` float32 ``[K, K]`` of the activation that meets
``w``. Columns are independent: the expected squared output error is
``sum_n d_n^T gram d_n`` with ``d = dequantized - w``, so every choice below is made per column.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # rows compensated before the rest of the matrix is updated


class Grid(NamedTuple):
    """Quantization grid of every (group, column).

    Attributes:
      scale: float32 ``[G, N]``, values exactly representable in the stored dtype; 0 means that
        the group is all zero.
      zero: float32 ``[G, N]``, integers ``0 ... 2**bits - 1``.
    """

    scale: jax.Array
    zero: jax.Array


def store(scale: jax.Array, dtype: str) -> jax.Array:
    """Round ``scale`` to what the stored dtype can represent, back in float32."""
    return scale.astype(dtype).astype(jnp.float32)


def make_grid(low: jax.Array, high: jax.Array, bits: int, symmetric: bool, dtype: str) -> Grid:
    """Grid that covers ``[low, high]`` and 0 (``low``, ``high``: ``[G, N]``).

    Including 0 keeps constant groups away from zero representable: a group in [1.0, 1.1] needs
    codes up to 1.1, which a grid fitted to the range alone cannot reach with a clamped zero point.
    """
    top = 2**bits - 1
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    if symmetric:
        # One more code below zero than above: the wider half spans 2**(bits-1) - 0.5 steps.
        half = 2.0 ** (bits - 1)
        scale = store(jnp.maximum(-low, high) / (half - 0.5), dtype)
        return Grid(scale, jnp.full_like(scale, half))
    scale = store((high - low) / top, dtype)
    zero = jnp.clip(jnp.round(-low / jnp.where(scale > 0, scale, 1.0)), 0, top)
    return Grid(scale, zero)


def encode(w: jax.Array, grid: Grid, bits: int) -> jax.Array:
    """Nearest codes, float32 ``[G, g, N]``, of ``w [G, g, N]``."""
    safe = jnp.where(grid.scale > 0, grid.scale, 1.0)[:, None]
    return jnp.clip(jnp.round(w / safe) + grid.zero[:, None], 0, 2**bits - 1)


def decode(codes: jax.Array, grid: Grid) -> jax.Array:
    """Inverse of `encode`: ``[G, g, N]`` float32."""
    return (codes - grid.zero[:, None]) * grid.scale[:, None]


def range_of(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest value of every (group, column) of ``w [G, g, N]``."""
    return w.min(axis=1), w.max(axis=1)


def quantize_dequantize(w: jax.Array, group: int, bits: int, symmetric: bool, dtype: str) -> jax.Array:
    """Round ``w [K, N]`` to nearest on the unclipped grid and return it in float32."""
    wg = w.reshape(-1, group, w.shape[-1])
    grid = make_grid(*range_of(wg), bits, symmetric, dtype)
    return decode(encode(wg, grid, bits), grid).reshape(w.shape)


def column_loss(delta: jax.Array, gram: jax.Array) -> jax.Array:
    """``d_n^T gram d_n`` for every column of ``delta [K, N]``; never negative.

    ``gram`` may be one energy per row, ``[K]``: a diagonal matrix.
    """
    spread = gram[:, None] * delta if gram.ndim == 1 else gram @ delta
    return jnp.maximum((delta * spread).sum(axis=0), 0.0)


class Factor(NamedTuple):
    """What `compensate` needs of a Gram; see `factorize`.

    Attributes:
      order: int32 ``[K]``: channels in order of falling ``diag(gram)``.
      inverse: float32 ``[K, K]``: `inverse_factor` of the Gram in that order.
    """

    order: jax.Array
    inverse: jax.Array


def factorize(gram: jax.Array, damping: float) -> Factor:
    """The factor of a Gram ``[K, K]``, whose columns may then be compensated in any pieces."""
    order = jnp.argsort(-jnp.diagonal(gram), stable=True)
    return Factor(order, inverse_factor(gram[order][:, order], damping))


def conditional_energy(gram: jax.Array, factor: Factor) -> jax.Array:
    """What compensation cannot take away from each channel, ``[K]``.

    With rows rounded in order of falling ``diag(gram)`` and every error spread over the rows still to
    come, the squared output error is ``sum_k energy_k * e_k**2`` with e the rounding error of row k:
    the energy is the variance of channel k given the channels rounded after it (the pivot of the
    LDL factorisation), not the variance itself.
    """
    pivots = 1.0 / jnp.square(jnp.diagonal(factor.inverse))
    energy = jnp.zeros_like(pivots).at[factor.order].set(pivots)
    return jnp.where(jnp.diagonal(gram) > 0, energy, 0.0)


def diagonal_blocks(gram: jax.Array, group: int) -> jax.Array:
    """``[G, g, g]`` blocks of ``gram [K, K]`` on the diagonal."""
    k = gram.shape[0]
    blocks = gram.reshape(k // group, group, k // group, group)
    return jnp.einsum("igih->igh", blocks)


def clip_search(
    w: jax.Array, metric: jax.Array, bits: int, symmetric: bool, dtype: str, steps: int = 10, floor: float = 0.5
) -> Grid:
    """Shrink each group's range so that its own squared output error is least.

    Paper section 3.2 ("clipping"), with upper and lower bound shrunk independently and the error
    taken from second moments instead of sampled activations.

    Args:
      w: ``[G, g, N]``.
      metric: what an error costs: the diagonal blocks of the Gram ``[G, g, g]``, or one energy per row
        ``[G, g]`` (see `conditional_energy`).
      steps: factors tried per bound, evenly from 1 down to ``floor`` (exclusive).
    """
    low, high = range_of(w)
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    factors = 1.0 - (1.0 - floor) / steps * jnp.arange(steps, dtype=jnp.float32)
    if symmetric:
        pairs = jnp.stack([factors, factors], axis=1)
    else:
        pairs = jnp.stack(jnp.meshgrid(factors, factors, indexing="ij"), axis=-1).reshape(-1, 2)

    def loss_of(pair: jax.Array) -> tuple[Grid, jax.Array]:
        grid = make_grid(low * pair[0], high * pair[1], bits, symmetric, dtype)
        delta = decode(encode(w, grid, bits), grid) - w
        spread = metric[:, :, None] * delta if metric.ndim == 2 else jnp.einsum("Ghg,Ggn->Ghn", metric, delta)
        return grid, (delta * spread).sum(axis=1)

    def step(best: tuple[Grid, jax.Array], pair: jax.Array) -> tuple[tuple[Grid, jax.Array], None]:
        grid, loss = loss_of(pair)
        better = loss < best[1]
        kept = Grid(*(jnp.where(better, new, old) for new, old in zip(grid, best[0], strict=True)))
        return (kept, jnp.where(better, loss, best[1])), None

    (grid, _), _ = jax.lax.scan(step, loss_of(pairs[0]), pairs[1:])
    return grid


def inverse_factor(gram: jax.Array, damping: float) -> jax.Array:
    """Upper-triangular ``U`` with ``U^T U = (gram + damping)^-1``.

    The damping is relative to each channel's own energy plus a small share of the mean, so that
    one channel a thousand times larger than the rest does not drown the others. Channels that were
    never active get the mean: they are rounded to nearest.
    """
    diag = jnp.diagonal(gram)
    mean = jnp.maximum(diag.mean(), 1e-30)
    add = jnp.where(diag > 0, damping * (diag + 0.1 * mean), mean)
    flipped = (gram + jnp.diag(add))[::-1, ::-1]
    lower = jnp.linalg.cholesky(flipped)
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return jax.scipy.linalg.solve_triangular(lower, eye, lower=True)[::-1, ::-1]


def compensate(w: jax.Array, factor: Factor, grid: Grid, bits: int) -> jax.Array:
    """Round row by row, each error spread over the rows not yet rounded (arXiv 2210.17323).

    The grid is fixed beforehand, so the order of rows leaves no trace in the stored format.

    Args:
      w: ``[K, N]``.
      factor: of the Gram of what meets ``w``.
      grid: parameters per (group, column).

    Returns:
      codes float32 ``[K, N]``.
    """
    k, n = w.shape
    group = k // grid.scale.shape[0]
    order, u = factor
    pad = -k % BLOCK
    if pad:
        u = jnp.pad(u, ((0, pad), (0, pad))) + jnp.diag(jnp.where(jnp.arange(k + pad) < k, 0.0, 1.0))
    scale = jnp.pad(jnp.repeat(grid.scale, group, axis=0)[order], ((0, pad), (0, 0)))
    zero = jnp.pad(jnp.repeat(grid.zero, group, axis=0)[order], ((0, pad), (0, 0)))
    rest = jnp.pad(w[order], ((0, pad), (0, 0)))
    top = 2**bits - 1

    def block(start_block: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rest, codes = carry
        start = start_block * BLOCK
        rows = jax.lax.dynamic_slice(rest, (start, 0), (BLOCK, n))
        s = jax.lax.dynamic_slice(scale, (start, 0), (BLOCK, n))
        z = jax.lax.dynamic_slice(zero, (start, 0), (BLOCK, n))
        u_rows = jax.lax.dynamic_slice(u, (start, 0), (BLOCK, k + pad))
        u_block = jax.lax.dynamic_slice(u_rows, (0, start), (BLOCK, BLOCK))

        def row(i: jax.Array, c: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            rows, q, errors = c
            w_i, s_i, z_i = rows[i], s[i], z[i]
            q_i = jnp.clip(jnp.round(w_i / jnp.where(s_i > 0, s_i, 1.0)) + z_i, 0, top)
            e_i = (w_i - (q_i - z_i) * s_i) / u_block[i, i]
            # u_block is upper triangular: rows already rounded are not touched again.
            rows = rows - u_block[i][:, None] * e_i[None, :]
            return rows, q.at[i].set(q_i), errors.at[i].set(e_i)

        zeros = jnp.zeros_like(rows)
        _, q, errors = jax.lax.fori_loop(0, BLOCK, row, (rows, zeros, zeros))
        rest = rest - u_rows.T @ errors
        return rest, jax.lax.dynamic_update_slice(codes, q, (start, 0))

    _, codes = jax.lax.fori_loop(0, (k + pad) // BLOCK, block, (rest, jnp.zeros_like(rest)))
    return jnp.zeros((k, n), jnp.float32).at[order].set(codes[:k])


def refit(w: jax.Array, gram: jax.Array, codes: jax.Array, grid: Grid, dtype: str) -> Grid:
    """Least-squares scales for codes that are already chosen.

    For column n, ``dequantized = sum_G scale_G * (codes - zero)_G``: a G-dimensional quadratic in the
    scales with a closed-form minimum. Groups whose new scale would not stay within a factor of two
    keep the old one.
    """
    k, n = w.shape
    groups = grid.scale.shape[0]
    size = k // groups
    base = codes.reshape(groups, size, n) - grid.zero[:, None]

    def against(i: jax.Array) -> jax.Array:
        """Products ``[G, N]`` of the part that group ``i`` makes with the parts of all groups."""
        rows = jax.lax.dynamic_slice(gram, (i * size, 0), (size, k))
        return (base * (rows.T @ base[i]).reshape(base.shape)).sum(axis=1)

    # One group at a time: all at once would take K x G numbers for each column.
    a = jnp.moveaxis(jax.lax.map(against, jnp.arange(groups)), 2, 0)
    b = (base * (gram @ w).reshape(base.shape)).sum(axis=1).T
    diag = jnp.einsum("nGG->nG", a)
    floor = 1e-4 * diag.mean(axis=1, keepdims=True) + 1e-30
    a = a + jnp.eye(groups) * floor[:, :, None]
    b = b + floor * grid.scale.T
    solved = jnp.linalg.solve(a, b[..., None])[..., 0].T
    ok = (solved > 0.5 * grid.scale) & (solved < 2.0 * grid.scale)
    return Grid(store(jnp.where(ok, solved, grid.scale), dtype), grid.zero)
