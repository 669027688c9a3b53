"""The loss of rows: the negative log likelihood of the tokens that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from awq_jax.lora import rows
from awq_jax.lora.rows import Row


def summed(apply: Callable[..., jax.Array], batch: dict[str, jax.Array], *params: Any) -> jax.Array:
    """Summed over a batch of `awq_jax.lora.rows.batches`, in nats.

    Args:
      apply: ``apply(*params, ids [B, T]) -> logits [B, T, V]``.
      batch: ``ids`` and ``counts``, ``[B, T]``.
    """
    ids = batch["ids"]
    logits = apply(*params, ids[:, :-1])
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]) * batch["counts"][:, 1:])


def mean(total: Callable[..., jax.Array], data: Sequence[Row], size: int, *params: Any) -> float:
    """Mean over the tokens of rows, in nats.

    Args:
      total: `summed` of a model, compiled: ``total(batch, *params)``.
      size: rows at a time.
    """
    loss = count = 0.0
    for i in range(0, len(data), size):
        whole = rows.collated([data[min(j, len(data) - 1)] for j in range(i, i + size)])
        batch = {name: a[0] for name, a in whole.items()}
        batch["counts"][len(data) - i :] = 0  # the last batch is filled up
        loss += float(total(batch, *params))
        count += float(batch["counts"].sum())
    return loss / max(count, 1.0)
