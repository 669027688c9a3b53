"""How far a Gram is to be trusted: its correlations are shrunk, as what rounding errors are compensated by.

Compensation moves the error of one channel into others by how they go together in the calibration tokens. A part of
that is chance, and a part holds for that text only; on other text such a move adds error. So the Gram is taken as

    H <- (1 - a) H + a diag(H).

By Ledoit and Wolf (A well-conditioned estimator for large-dimensional covariance matrices, 2004) the best share, if
tokens were drawn independently, is that of chance in what is seen: with C the correlations of m channels in n tokens,

    chance = sum over i != j of var(C_ij) / sum over i != j of C_ij^2,    var(C_ij) ~ 1 / n.

Tokens of a text are far from independent, large activations are rarer than normal numbers', and the model is used on
other text than it is calibrated on. Hence chance counts `DEPENDENT` times, and no Gram is trusted more than by
``1 - DOMAIN``. Both are chosen by trial, not derived: stories15M at 3 bits, KL to float of text not calibrated on,
with chance counted 10 and 3 times: .324 and .327 (256 tokens of its own), .266 and .249 (2,048), .404 and .419 (2,048
of WikiText), each +- .02.
"""

import jax
import jax.numpy as jnp
import numpy as np

DEPENDENT = 3.0
DOMAIN = 0.1
FEW = 0.5  # from this share on, tokens are too few for the width of an input
ENOUGH = 0.3  # the share with as many as would do
STEP = 1 / 64  # shares are multiples of it, below 1: how a sum was ordered does not show in them


def share(gram: jax.Array, tokens: jax.Array | np.float32) -> jax.Array:
    """The share ``a`` by which a Gram is shrunk to its diagonal: a scalar from `DOMAIN` up, below 1.

    Args:
      gram: float32 ``[K, K]``, of any scale: channels may be multiplied by factors, and the whole by one.
      tokens: how many it is of.
    """
    energy = jnp.diagonal(gram)
    live = energy > 0
    root = jnp.where(live, jax.lax.rsqrt(jnp.where(live, energy, 1.0)), 0.0)
    # Row by row: as one sum of K^2 numbers it would lose digits.
    seen = jnp.square(gram * root[:, None] * root[None, :]).sum(axis=1).sum() - live.sum()
    pairs = live.sum() * (live.sum() - 1.0)
    chance = jnp.clip(pairs / jnp.maximum(seen, 1e-30) / jnp.maximum(tokens, 1.0), 0.0, 1.0)
    chance = jnp.where(seen > 0, chance, 0.0)  # a single channel, or none that go together
    kept = (1 - DOMAIN) * (1 - chance) / (1 - chance + DEPENDENT * chance)
    return jnp.minimum(jnp.round((1 - kept) / STEP) * STEP, 1 - STEP)


def shrunk(gram: jax.Array, a: jax.Array | float) -> jax.Array:
    """``(1 - a) gram + a diag(gram)`` of ``[K, K]``; the diagonal stays as it is, to the bit."""
    k = gram.shape[0]
    return jnp.where(jnp.eye(k, dtype=bool), gram, (1 - a) * gram)


def tokens_that_would_do(a: float, tokens: float) -> float:
    """About how many tokens bring the share down to `ENOUGH` where ``tokens`` of them gave ``a``; see `share`."""

    def chance(a: float) -> float:
        kept = (1 - a) / (1 - DOMAIN)
        return (1 - kept) / (1 + (DEPENDENT - 1) * kept)

    return tokens * chance(a) / chance(ENOUGH)
