"""What a weight should be once its input is that of a quantized model.

Let ``a`` be the input that a linear has in the quantized model, ``b`` the one it has in the float model, and ``d`` the
error of the residual stream that its result is added to (float less quantized; 0 if it is added to nothing). The weight
that gives what the float model has there, in least squares over the calibration tokens, solves

    H (W* - W) = E[a^T (b - a)] W + E[a^T d],   H = E[a^T a].

This is a regression on an estimate: on few tokens its solution fits them and nothing else. So it is damped by ``lam``
per channel and each term is taken in part only,

    W* = W + (H + lam)^-1 (alpha E[a^T (b - a)] W + rho E[a^T d]),

and alpha, rho (0 to 1) and lam are those that predict best on sequences that the regression has not seen, by
cross-validation over folds of whole sequences. Where nothing carries over to them, alpha and rho are 0.

Quantizing layer by layer on the quantized stream goes back to GPTQ (arXiv 2210.17323, section 4); the correction
of the target for its drift is Qronos' (arXiv 2505.11695) and GPTAQ's (arXiv 2504.02692), both with a fixed strength.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.algorithm.cholesky import inverse_cholesky
from awq_jax.pack import Array

LAMS = (0.03, 0.3, 3.0)  # tried, as a share of each channel's energy and of a tenth of the mean
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
    """How much of a correction is taken: see the module. All 0 with ``lam`` the largest: none of it."""

    alpha: float
    rho: float
    lam: float


NONE = Strength(0.0, 0.0, LAMS[-1])


def strengths(folds: Sequence[Moments], w: Array, streamed: Array) -> Strength:
    """Choose the strength of the correction by cross-validation.

    Args:
      folds: sums over disjoint sets of sequences, two at least.
      w: float32 ``[K, C]``: some columns of the weights (see `some_columns`).
      streamed: int32 ``[C]``: which column of `Moments.stream` belongs to each; -1 for none.
    """
    total = functools.reduce(_add, folds)
    best, chosen = 0.0, NONE
    for lam in LAMS:
        m, v = np.zeros((2, 2)), np.zeros(2)
        for fold in folds:
            quadratic, linear = _carried_over(total, fold, w, streamed, np.float32(lam))
            m, v = m + np.asarray(quadratic, np.float64), v + np.asarray(linear, np.float64)
        c = _within_bounds(m, v)
        gain = float(2 * c @ v - c @ m @ c)
        if gain > best:
            best, chosen = gain, Strength(float(c[0]), float(c[1]), lam)
    return chosen


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


@jax.jit
def _add(a: Moments, b: Moments) -> Moments:
    return jax.tree.map(jnp.add, a, b)


@jax.jit
def _carried_over(total: Moments, fold: Moments, w: Array, streamed: Array, lam: Array) -> tuple[jax.Array, jax.Array]:
    """Of the corrections fitted without ``fold``: on its tokens, their products with each other and with the aim."""
    drift, stream = fold.drift @ w, some_of(fold.stream, streamed)
    all_drift, all_stream = total.drift @ w, some_of(total.stream, streamed)
    inverse = _inverse(total.gram - fold.gram, lam)
    moves = [inverse.T @ (inverse @ right) for right in (all_drift - drift, all_stream - stream)]
    aim = drift + stream
    spread = [fold.gram @ move for move in moves]
    quadratic = jnp.stack([jnp.stack([_dot(a, b) for b in spread]) for a in moves])
    return (quadratic + quadratic.T) / 2, jnp.stack([_dot(a, aim) for a in moves])


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a * b).sum(axis=0).sum()


def some_of(stream: jax.Array, streamed: Array) -> jax.Array:
    """Columns ``[..., C]`` of ``stream [..., R]`` by number; zeros for -1."""
    if not stream.shape[1]:
        return jnp.zeros((len(stream), len(streamed)), stream.dtype)
    streamed = jnp.asarray(streamed)
    return jnp.where(streamed >= 0, stream[:, jnp.maximum(streamed, 0)], 0.0)


def _inverse(gram: jax.Array, lam: Array | np.float32) -> jax.Array:
    """The inverse ``X`` of a Cholesky factor: ``X^T X = (gram + lam)^-1``."""
    diagonal = jnp.diagonal(gram)
    mean = jnp.maximum(diagonal.mean(), 1e-30)
    return inverse_cholesky(gram + jnp.diag(jnp.where(diagonal > 0, lam * (diagonal + 0.1 * mean), mean)))


def some_columns(n: int) -> np.ndarray:
    """int32: at most `COLUMNS` of n columns, spread evenly."""
    return np.unique(np.linspace(0, n - 1, min(COLUMNS, n)).astype(np.int32))


@jax.jit
def prepare(moments: Moments, alpha: np.float32, rho: np.float32, lam: np.float32) -> Moments:
    """What `corrected` needs for all columns: the inverse factor, and both right sides as far as they are taken."""
    return Moments(_inverse(moments.gram, lam), jnp.asarray(alpha) * moments.drift, jnp.asarray(rho) * moments.stream)


@jax.jit
def corrected(w: Array, prepared: Moments, streamed: Array) -> jax.Array:
    """``W*`` of some columns ``w [K, C]``; see the module.

    Args:
      prepared: from `prepare`.
      streamed: see `strengths`.
    """
    inverse, drift, stream = prepared
    right = drift @ w + some_of(stream, streamed)
    return jnp.asarray(w) + inverse.T @ (inverse @ right)


@jax.jit
def remaining(moments: Moments, gap: Array, w: Array, streamed: Array, stored: Array) -> tuple[jax.Array, jax.Array]:
    """Of some columns, on the tokens of ``moments``: how far results are from the float model's, and their own squares.

    Args:
      moments, gap: sums over tokens; ``gap [C]`` of the squares of ``(b - a) w + d``.
      w: float32 ``[K, C]``: the weights.
      streamed: see `strengths`.
      stored: float32 ``[K, C]``: what stands for them.

    Returns:
      ``[C]`` twice: sums of ``|a stored - b w - d|^2``, and of ``|a w|^2``.
    """
    delta = jnp.asarray(stored) - w
    aim = moments.drift @ w + some_of(moments.stream, streamed)
    lost = (delta * (moments.gram @ delta - 2 * aim)).sum(axis=0) + gap
    return jnp.maximum(lost, 0.0), (jnp.asarray(w) * (moments.gram @ w)).sum(axis=0)
