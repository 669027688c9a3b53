"""Sums over the tokens of a batch of what a linear's input is in the float model and in the quantized one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from awq_jax.algorithm.correction import Moments, some_of
from awq_jax.calibration.calibration import SLAB, SLAB_CHANNELS, Stats, batch_sums


class PairSums(NamedTuple):
    """Sums over tokens.

    Attributes:
      stats: of the input in the quantized model.
      moments: of both, with the Gram of the former.
      gap: float32 ``[C]``: squares of what some columns' results would have to be changed by; zeros where that is not
        asked for.
    """

    stats: Stats
    moments: Moments
    gap: jax.Array


def pair_sums(
    a: jax.Array, b: jax.Array, d: jax.Array, w: jax.Array, streamed: jax.Array, span: jax.Array, judged: jax.Array
) -> PairSums:
    """Sums over tokens, those left out at which ``a``, ``b`` or ``d`` is not finite.

    Args:
      a: float32 ``[T, K]``: inputs in the quantized model, unscaled.
      b: ``[T, K]``: the same in the float model.
      d: float32 ``[T, R]``: errors of the streams that results are added to (float less quantized); R may be 0.
      w: float32 ``[K, C]``: some columns of the weights.
      streamed: int32 ``[C]``: the columns of ``d`` that belong to theirs; -1 for none.
      span: int32 ``[2]``: the first token that counts, and the first after them.
      judged: bool: whether ``gap`` is asked for.
    """
    b = b.astype(jnp.float32)
    wanted = (jnp.arange(len(a)) >= span[0]) & (jnp.arange(len(a)) < span[1])
    finite = (jnp.isfinite(a) & jnp.isfinite(b)).all(axis=1) & jnp.isfinite(d).all(axis=1)
    dropped = (wanted & ~finite).sum(dtype=jnp.float32)
    a, b, d = (jnp.where((wanted & finite)[:, None], x, 0.0) for x in (a, b, d))
    stats = batch_sums(a)

    def gaps() -> jax.Array:
        return jnp.square((b - a) @ w + some_of(d, streamed)).sum(axis=0)

    gap = jax.lax.cond(judged, gaps, lambda: jnp.zeros(w.shape[1], jnp.float32))
    k, gram = a.shape[1], jnp.asarray(stats.gram)
    cross = _product(a, jnp.concatenate([b - a, d], axis=1))
    return PairSums(Stats(gram, stats.abs, stats.count, dropped), Moments(gram, cross[:, :k], cross[:, k:]), gap)


def _product(a: jax.Array, right: jax.Array) -> jax.Array:
    """``a^T right``, ``[K, J]``: where K is small in slabs of tokens, as Grams are (see `batch_sums`)."""

    def of(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum("tk,tj->kj", x, y, precision=jax.lax.Precision.HIGHEST)

    k, j = a.shape[1], right.shape[1]
    if k > SLAB_CHANNELS or len(a) <= SLAB:
        return of(a, right)
    slabs = -(-len(a) // SLAB)
    a, right = (jnp.pad(x, ((0, slabs * SLAB - len(x)), (0, 0))) for x in (a, right))

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + of(*(jax.lax.dynamic_slice_in_dim(x, i * SLAB, SLAB) for x in (a, right)))

    return jax.lax.fori_loop(0, slabs, add, jnp.zeros((k, j), jnp.float32))
