"""Mixture of experts: which of them a token goes through, and with what weight (`route`); the experts.

A whole sequence goes through every expert, and what a token was not routed to is masked out: one
batched matmul per matrix, whose activations calibration can tell apart by expert. A single new
token per row gathers its experts' weights instead, and packed experts only ever see the rows that
were routed to them (see `awq_jax.kernels.grouped`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from awq_jax import kernels
from awq_jax import nnx as nnx_layers
from awq_jax.kernels import grouped, parallel
from awq_jax.models.config import MoEConfig
from awq_jax.models.layers.linear import Linear
from awq_jax.models.layers.mlp import MLP, gated
from awq_jax.pack import Array
from awq_jax.paths import path_str
from awq_jax.placement import float_spec
from awq_jax.qtensor import QuantizedTensor

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


T = TypeVar("T")


def by_expert(w: T) -> T:
    """A packed ``[E, K, N]`` leaf whose experts share one activation (axes ``nkn``) as a batch (``bkn``)."""
    if not isinstance(w, QuantizedTensor) or w.axes != "nkn":
        return w
    experts, n = w.n_dims

    def columns(a: jax.Array) -> jax.Array:  # [R, E * N] -> [E, R, N]
        return jnp.moveaxis(a.reshape(*a.shape[:-1], experts, n), -2, 0)

    def rows(a: Array | None) -> jax.Array | None:  # [K] -> [E, K]
        return None if a is None else jnp.broadcast_to(a, (experts, *a.shape))

    tables: dict[str, Any] = {
        f: columns(a) for f in ("qweight", "scales", "zeros", "offsets") if (a := getattr(w, f)) is not None
    }
    return dataclasses.replace(w, **tables, inv_scale=rows(w.inv_scale), perm=rows(w.perm), axes="bkn", n_dims=(n,))


class Experts(nnx.Module):
    """One linear per expert: ``kernel [E, K, N]``, which may be packed, and optionally ``bias [E, N]``."""

    def __init__(self, experts: int, size: int, out: int, use_bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (experts, size, out)) * size**-0.5)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((experts, out)))
        self.use_bias = use_bias

    def __call__(self, x: jax.Array, chosen: jax.Array | None = None, sparse: bool = False) -> jax.Array:
        """Each expert on its rows.

        Args:
          x: ``[T, K]``, read by all experts, or ``[E, T, K]``.
          chosen: int32 ``[P]``: use these experts only, ``x`` being ``[P, 1, K]``.
          sparse: many entries are -1 (no expert); packed experts only.

        Returns:
          ``[E, T, N]``, or ``[P, T, N]``.
        """
        w = by_expert(self.kernel.get_value())
        if chosen is not None and isinstance(w, QuantizedTensor):
            dtype = jnp.promote_types(x.dtype, w.dtype)
            y = grouped.matmul(x[:, 0].astype(dtype), w, chosen, sparse=sparse)[:, None]
            return (y + self.bias.get_value()[chosen][:, None] if self.use_bias else y).astype(x.dtype)
        if chosen is not None:
            w = jax.tree.map(lambda a: a[chosen], w)
        if isinstance(w, QuantizedTensor):
            rows = jnp.broadcast_to(x, (w.batch[0], *x.shape[-2:]))
            y = kernels.matmul(rows, w).astype(jnp.promote_types(x.dtype, w.dtype))
        else:
            y = jnp.einsum("tk,ekn->etn" if x.ndim == 2 else "etk,ekn->etn", x, w)
        if self.use_bias:
            bias = self.bias.get_value()
            y = y + (bias if chosen is None else bias[chosen])[:, None]
        return y.astype(x.dtype)


class ExpertMLP(nnx.Module):
    """The experts' MLPs, side by side."""

    def __init__(self, size: int, config: MoEConfig, rngs: nnx.Rngs):
        c, n = config.expert, config.experts
        if c.fused:
            self.gate_up_proj = Experts(n, size, 2 * c.size, c.bias, rngs)
        else:
            self.gate_proj = Experts(n, size, c.size, c.bias, rngs)
            self.up_proj = Experts(n, size, c.size, c.bias, rngs)
        self.down_proj = Experts(n, c.size, size, c.bias, rngs)
        self.config = config

    def __call__(self, x: jax.Array, weights: jax.Array) -> jax.Array:
        """All tokens ``x [T, hidden]`` through all experts, summed with ``weights [T, E]``."""
        routed = (weights > 0).T[..., None]
        inner = jnp.where(routed, self.inner(x, None), 0)  # calibration skips rows of zeros
        return jnp.einsum("etd,te->td", self.down_proj(inner), weights.astype(x.dtype))

    def chosen(self, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
        """Tokens ``x [T, hidden]`` through ``experts [T, k]`` only, summed with ``weights [T, k]``."""
        kernels_ = [e.kernel.get_value() for e in vars(self).values() if isinstance(e, Experts)]
        place = next((k.placement for k in kernels_ if isinstance(k, QuantizedTensor)), None)
        if place is None:
            return self._chosen(x, weights, experts, False)
        graphdef, state = nnx.split(self)
        own = place.dim == "b"

        def cut(path: tuple[object, ...], leaf: jax.Array) -> PartitionSpec:
            down = "down_proj" in path_str(path)
            if leaf.ndim == 3:  # a float kernel
                return float_spec("b" if own else "k" if down else "n", 3, place.axis)
            return float_spec("b" if own else "" if down else "n", 2, place.axis)

        def run(state: nnx.State, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
            part: ExpertMLP = nnx.merge(graphdef, state)
            index = jax.lax.axis_index(place.axis)
            if own:
                each = self.config.experts // place.size
                here = experts // each == index
                weights, experts = jnp.where(here, weights, 0), jnp.where(here, experts - each * index, -1)
            elif place.dim and part.down_proj.use_bias:  # once
                part.down_proj.bias.set_value(jnp.where(index == 0, part.down_proj.bias.get_value(), 0))
            return part._chosen(x, weights, experts, own)

        return parallel.summed(run, state, cut, place, x, weights, experts)

    def _chosen(self, x: jax.Array, weights: jax.Array, experts: jax.Array, sparse: bool) -> jax.Array:
        tokens, k = experts.shape
        rows = jnp.repeat(x, k, axis=0)[:, None]
        pick = experts.reshape(-1)
        y = self.down_proj(self.inner(rows, pick, sparse), pick, sparse).reshape(tokens, k, -1)
        return jnp.einsum("tkd,tk->td", y, weights.astype(x.dtype))

    def inner(self, x: jax.Array, pick: jax.Array | None, sparse: bool = False) -> jax.Array:
        c = self.config.expert
        if c.fused:
            gate, up = jnp.split(self.gate_up_proj(x, pick, sparse), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x, pick, sparse), self.up_proj(x, pick, sparse)
        return gated(gate, up, c)


class MoE(nnx.Module):
    """Router, experts, and an optional expert that all tokens share."""

    def __init__(self, size: int, config: MoEConfig, rngs: nnx.Rngs):
        # A small difference may change a choice: logits are never rounded to 16 bits.
        self.gate = nnx_layers.Linear(
            size, config.experts, use_bias=config.router_bias, preferred_element_type=jnp.float32, rngs=rngs
        )
        if config.correction:
            row = (1,) if config.correction == "row" else ()
            self.correction = nnx.Param(jnp.zeros((*row, config.experts)))
        self.experts = ExpertMLP(size, config, rngs)
        if config.shared is not None:
            self.shared_expert = MLP(size, config.shared, rngs)
            if config.shared_gate:
                self.shared_expert_gate = Linear(size, 1, use_bias=False, rngs=rngs)
        self.config = config

    def __call__(self, x: jax.Array, decoding: bool) -> jax.Array:
        """``x [B, T, hidden]`` to the same shape; ``decoding`` if one token per row follows a cache."""
        c = self.config
        rows = x.reshape(-1, x.shape[-1])
        correction = self.correction.get_value() if c.correction else None
        weights, chosen = route(self.gate(rows), c, correction)
        few = decoding and rows.shape[0] * c.top_k <= c.experts
        if few or isinstance(self.experts.down_proj.kernel.get_value(), QuantizedTensor):
            y = self.experts.chosen(rows, weights, chosen)
        else:
            dense = jnp.zeros((rows.shape[0], c.experts), weights.dtype)
            y = self.experts(rows, dense.at[jnp.arange(rows.shape[0])[:, None], chosen].set(weights))
        if c.shared is not None:
            extra = self.shared_expert(rows)
            y = y + (jax.nn.sigmoid(self.shared_expert_gate(rows)) * extra if c.shared_gate else extra)
        return y.reshape(x.shape)
