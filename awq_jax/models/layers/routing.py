"""Which experts a token goes through, and with what weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from awq_jax.models.config import MoEConfig

TINY = 1e-20  # DeepSeek's guard against a sum of zero; it changes no other


def route(logits: jax.Array, config: MoEConfig, correction: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """A router's logits to the weights and the numbers of each token's experts.

    Args:
      logits: ``[T, E]``.
      config: how.
      correction: ``[E]`` or ``[1, E]``, with `MoEConfig.correction`.

    Returns:
      float32 and int32 ``[T, top_k]``, best first.
    """
    c = config
    logits = logits.astype(jnp.float32)
    if c.score == "sparsemixer":
        return _sparsemixer(logits, c.top_k, c.jitter)
    scores = jax.nn.sigmoid(logits) if c.score == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    ranked = scores if correction is None else scores + correction.astype(jnp.float32)
    if c.groups > 1:
        ranked = _best_groups(ranked, c)
    _, chosen = jax.lax.top_k(ranked, c.top_k)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if c.normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + TINY)
    return weights * c.scale, chosen


def _best_groups(scores: jax.Array, c: MoEConfig) -> jax.Array:
    """Scores ``[T, E]`` with those outside of each token's best groups at -inf (DeepSeek-V2, section 2.2)."""
    grouped = scores.reshape(len(scores), c.groups, -1)
    best = jax.lax.top_k(grouped, c.group_best)[0].sum(axis=-1)
    _, keep = jax.lax.top_k(best, c.top_groups)
    kept = (keep[:, :, None] == jnp.arange(c.groups)).any(axis=1)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores.shape)


def _sparsemixer(logits: jax.Array, k: int, jitter: float) -> tuple[jax.Array, jax.Array]:
    """The best expert, then the best of the rest; the weight of each is a softmax over those close to it."""
    weights, chosen, left = [], [], logits
    for _ in range(k):
        best = left.max(axis=-1, keepdims=True)
        far = (best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * jitter
        pick = jnp.argmax(left, axis=-1, keepdims=True)
        gates = jax.nn.softmax(jnp.where(far, -jnp.inf, left), axis=-1)
        weights.append(jnp.take_along_axis(gates, pick, axis=-1))
        chosen.append(pick)
        left = jnp.where(jnp.arange(logits.shape[-1]) == pick, -jnp.inf, left)
    return jnp.concatenate(weights, axis=-1), jnp.concatenate(chosen, axis=-1).astype(jnp.int32)
