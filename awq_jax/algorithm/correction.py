"""What a weight should be once its input is that of a quantized model.

Let ``a`` be the input that a linear has in the quantized model, ``b`` the one it has in the float model, and ``d`` the
error of the residual stream that its result is added to (float less quantized; 0 if it is added to nothing). The weight
that gives what the float model has there, in least squares over the calibration tokens, solves

    H (W* - W) = E[a^T (b - a)] W + E[a^T d],   H = E[a^T a].

This is a regression on an estimate: on few tokens its solution fits them and nothing else. So it is damped by ``lam``
per channel and each term is taken in part only,

    W* = W + (H + lam)^-1 (alpha E[a^T (b - a)] W + rho E[a^T d]),

and alpha and rho (0 to 1) are those that predict best on whole sequences that the regression has not seen. Where
nothing carries over, alpha and rho are 0. For lam one value does: stories15M, 3 bits, KL of 10,240 tokens with the best
of .03, .3 and 3 by cross-validation .223, with .3 always .221, with .1 .223, each +- .003 of the others. Of four folds
of sequences one is enough to try it on, where all four, each from the other three, take three factorizations more: KL
.1625 against .1638 (64 sequences; paired error .0017), .2176 against .2152 (8 sequences; .0031).

Quantizing layer by layer on the quantized stream goes back to GPTQ (arXiv 2210.17323, section 4); the correction
of the target for its drift is Qronos' (arXiv 2505.11695) and GPTAQ's (arXiv 2504.02692), both with a fixed strength.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.algorithm import solve
from awq_jax.algorithm.solve import Blocks
from awq_jax.devices import host
from awq_jax.pack import Array

LAM = 0.3  # of each channel's energy and of a tenth of the mean
ROWS = 512  # of a Gram that NumPy multiplies with at a time
COLUMNS = 128  # of the weights, at most, that strengths are chosen by


class Moments(NamedTuple):
    """Sums over some tokens, of the input ``a`` of the quantized model and ``b`` of the float one (float32).

    Attributes:
      gram: ``[K, K]``: of ``a^T a``.
      drift: ``[K, K]``: of ``a^T (b - a)``.
      stream: ``[K, R]``: of ``a^T d``, with d the error of the residual stream, ``[T, R]``; R is 0 if there is none.
    """

    gram: jax.Array
    drift: jax.Array
    stream: jax.Array


class Strength(NamedTuple):
    """How much of a correction is taken: see the module."""

    alpha: float
    rho: float


NONE = Strength(0.0, 0.0)


def strengths(total: Moments, folds: Sequence[Moments], w: Array, streamed: Array, width: int) -> Strength:
    """Choose the strength of the correction by cross-validation.

    Args:
      total: sums over all.
      folds: over the disjoint sets of sequences, one or more, on each of which is tried what all others gave.
      w: float32 ``[K, C]``: some columns of the weights (see `some_columns`).
      streamed: int32 ``[C]``: which column of `Moments.stream` belongs to each; -1 for none.
      width: columns, at least as many as both right sides have, for which `corrected` is called as well: then both use
        one program.
    """
    sides = 2 if folds[0].stream.shape[1] else 1
    # On the host: additions of every shape would be programs.
    right, *rights = (np.asarray(_right_sides(each, w, streamed, sides=sides, width=width)) for each in (total, *folds))

    m, v = np.zeros((2, 2)), np.zeros(2)
    for fold, own in zip(folds, rights, strict=True):
        moves = _solve(_factor(total.gram, fold.gram, np.float32(1)), right - own)
        found = _carried_over(fold.gram, moves, own, sides=sides, columns=w.shape[1])
        quadratic, linear = (np.asarray(x, np.float64) for x in found)
        m[:sides, :sides] += quadratic
        v[:sides] += linear
    c = _within_bounds(m, v)
    return Strength(float(c[0]), float(c[1])) if 2 * c @ v > c @ m @ c else NONE


def _within_bounds(m: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The c in ``[0, 1]^2`` for which ``c m c - 2 c v`` is least, m being positive semidefinite."""
    candidates = [np.zeros(2)]
    if abs(np.linalg.det(m)) > 1e-12 * m[0, 0] * m[1, 1] > 0:
        inner = np.linalg.solve(m, v)
        if ((inner >= 0) & (inner <= 1)).all():
            return inner
    for i in (0, 1):  # otherwise it is on an edge
        for edge in (0.0, 1.0):
            c = np.full(2, edge)
            if m[i, i] > 0:
                c[i] = np.clip((v[i] - m[i, 1 - i] * edge) / m[i, i], 0.0, 1.0)
            candidates.append(c)
    losses = [c @ m @ c - 2 * c @ v for c in candidates]
    found = candidates[int(np.argmin(losses))]
    return np.where(np.diag(m) > 0, found, 0.0)


def _sides(moments: Moments, w: Array, streamed: Array) -> list[jax.Array]:
    """Of each column, what its correction for the drift, and for the stream if there is one, is solved for."""
    drift = moments.drift @ w
    return [drift, some_of(moments.stream, streamed)] if moments.stream.shape[1] else [drift]


@functools.partial(jax.jit, static_argnames=("sides", "width"))
def _right_sides(moments: Moments, w: Array, streamed: Array, *, sides: int, width: int) -> jax.Array:
    """`_sides` side by side, filled up to ``width``."""
    every = jnp.concatenate(_sides(moments, w, streamed), axis=1)
    return jnp.pad(every, ((0, 0), (0, max(0, width - every.shape[1]))))


@jax.jit
def _factor(gram: jax.Array, without: jax.Array, share: Array) -> Blocks:
    """Of ``gram - share without``, damped."""
    gram = gram - share * without
    diagonal = jnp.diagonal(gram)
    mean = jnp.maximum(diagonal.mean(), 1e-30)
    return solve.factor(gram + jnp.diag(jnp.where(diagonal > 0, LAM * (diagonal + 0.1 * mean), mean)))


_solve = jax.jit(solve.solve)


@functools.partial(jax.jit, static_argnames=("sides", "columns"))
def _carried_over(
    gram: jax.Array, moves: jax.Array, right: jax.Array, *, sides: int, columns: int
) -> tuple[jax.Array, jax.Array]:
    """Of ``moves`` that were fitted elsewhere: on a fold, their products with each other and with the aim."""

    def split(a: jax.Array) -> list[jax.Array]:
        return [a[:, i * columns : (i + 1) * columns] for i in range(sides)]

    aim = sum(split(right)[1:], start=split(right)[0])
    each, spread = split(moves), split(gram @ moves[:, : sides * columns])
    quadratic = jnp.stack([jnp.stack([_dot(a, b) for b in spread]) for a in each])
    return (quadratic + quadratic.T) / 2, jnp.stack([_dot(a, aim) for a in each])


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a * b).sum(axis=0).sum()


def some_of(stream: jax.Array, streamed: Array) -> jax.Array:
    """Columns ``[..., C]`` of ``stream [..., R]`` by number; zeros for -1."""
    if not stream.shape[1]:
        return jnp.zeros((len(stream), len(streamed)), stream.dtype)
    streamed = jnp.asarray(streamed)
    return jnp.where(streamed >= 0, stream[:, jnp.maximum(streamed, 0)], 0.0)


def some_columns(n: int, most: int = COLUMNS) -> np.ndarray:
    """int32: at most ``most`` of n columns, spread evenly."""
    return np.unique(np.linspace(0, n - 1, min(most, n)).astype(np.int32))


def prepare(moments: Moments) -> Blocks:
    """What `corrected` needs for all columns: the factor of the damped Gram."""
    return _factor(moments.gram, moments.gram, np.float32(0))


def corrected(w: Array, moments: Moments, prepared: Blocks, strength: Strength, streamed: Array) -> jax.Array:
    """``W*`` of some columns ``w [K, C]``; see the module.

    Args:
      moments: over all that is fitted.
      prepared: from `prepare`.
      streamed: see `strengths`.
    """
    taken = np.asarray(strength, np.float32)
    return jnp.asarray(w) + _solve(prepared, _right_side(moments, w, streamed, taken))


@jax.jit
def _right_side(moments: Moments, w: Array, streamed: Array, taken: Array) -> jax.Array:
    sides = [taken[i] * side for i, side in enumerate(_sides(moments, w, streamed))]
    return sum(sides[1:], start=sides[0])


def remaining(moments: Moments, gap: Array, w: Array, streamed: Array, stored: Array) -> tuple[Array, Array]:
    """Of some columns, on the tokens of ``moments``: how far results are from the float model's, and their own squares.

    Args:
      moments, gap: sums over tokens; ``gap [C]`` of the squares of ``(b - a) w + d``.
      w: float32 ``[K, C]``: the weights.
      streamed: see `strengths`.
      stored: float32 ``[K, C]``: what stands for them.

    Returns:
      ``[C]`` twice: sums of ``|a stored - b w - d|^2``, and of ``|a w|^2``.
    """
    seen = [host.view(a) for a in moments]
    if any(a is None for a in seen):
        return _remaining(moments, gap, w, streamed, stored)
    # A program for each number of columns would take longer than its work. Some rows at a time: the Gram is large.
    gram, drift, stream = cast(list[np.ndarray], seen)
    delta, w = np.asarray(stored, np.float64) - w, np.asarray(w, np.float64)
    lost, own = np.asarray(gap, np.float64), np.zeros(w.shape[1])
    for first in range(0, len(gram), ROWS):
        rows = slice(first, first + ROWS)
        h = gram[rows].astype(np.float64)
        aim = drift[rows] @ w if drift.any() else 0.0
        if stream.shape[1]:
            aim = aim + np.where(np.asarray(streamed) >= 0, stream[rows][:, np.maximum(streamed, 0)], 0.0)
        lost = lost + (delta[rows] * (h @ delta - 2 * aim)).sum(axis=0)
        own = own + (w[rows] * (h @ w)).sum(axis=0)
    return np.maximum(lost, 0.0).astype(np.float32), own.astype(np.float32)


@jax.jit
def _remaining(moments: Moments, gap: Array, w: Array, streamed: Array, stored: Array) -> tuple[jax.Array, jax.Array]:
    """`remaining` where the moments are not in the host's memory."""
    delta = jnp.asarray(stored) - w
    aim = moments.drift @ w + some_of(moments.stream, streamed)
    lost = (delta * (moments.gram @ delta - 2 * aim)).sum(axis=0) + gap
    return jnp.maximum(lost, 0.0), (jnp.asarray(w) * (moments.gram @ w)).sum(axis=0)
