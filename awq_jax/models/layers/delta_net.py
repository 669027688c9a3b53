"""Gated delta nets (arXiv 2412.06464): attention that keeps a state instead of keys and values."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.scipy.linalg import solve_triangular

from awq_jax.models.config import DeltaConfig, LayerConfig, NormConfig
from awq_jax.models.layers.attention import Step
from awq_jax.models.layers.cache import Recurrent
from awq_jax.models.layers.linear import Linear
from awq_jax.models.layers.norm import Norm

CHUNK = 64  # tokens whose updates are solved for together
NORM_EPS = 1e-6


class GatedDeltaNet(nnx.Module):
    """A short causal convolution, the gated delta rule, and a gated norm (Qwen3-Next)."""

    def __init__(self, size: int, layer: LayerConfig, rngs: nnx.Rngs):
        c = layer.attention
        assert isinstance(c, DeltaConfig)
        keys, values = c.key_heads * c.key_dim, c.value_heads * c.value_dim
        self.in_proj_qkvz = Linear(size, 2 * keys + 2 * values, use_bias=False, rngs=rngs)
        self.in_proj_ba = Linear(size, 2 * c.value_heads, use_bias=False, rngs=rngs)
        self.conv = nnx.Param(jax.random.normal(rngs.params(), (2 * keys + values, 1, c.window)) * c.window**-0.5)
        self.dt_bias = nnx.Param(jnp.ones(c.value_heads))
        self.A_log = nnx.Param(jnp.zeros(c.value_heads))
        self.norm = Norm(NormConfig(eps=c.eps), c.value_dim)
        self.out_proj = Linear(values, size, use_bias=False, rngs=rngs)
        self.config = c

    def __call__(self, x: jax.Array, step: Step, past: Recurrent | None) -> tuple[jax.Array, Recurrent]:
        """``x [B, T, hidden]`` -> the same shape, and the state after the last token that is not padding."""
        c = self.config
        if past is None:
            past = Recurrent.empty(c, x.shape[0], x.dtype)
        # Padding repeats a row's last position; the state must not see it.
        real = step.positions == step.positions[:, :1] + jnp.arange(x.shape[1])
        mixed, z, beta, log_decay = self.project(x)
        q, k, v, inputs = self.convolve(mixed, past.inputs, real.sum(axis=1))
        beta, log_decay = (jnp.where(real[..., None], a, 0.0) for a in (beta, log_decay))
        out, memory = delta_rule(q, k, v, log_decay, beta, past.memory)
        out = self.norm(out.astype(x.dtype)) * jax.nn.silu(z.astype(jnp.float32))
        return self.out_proj(out.astype(x.dtype).reshape(*x.shape[:-1], -1)), Recurrent(inputs, memory)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """What the convolution reads ``[B, T, channels]``; the gate of the output ``[B, T, value_heads, value_dim]``;
        the rate of learning and the logarithm of the decay, float32 ``[B, T, value_heads]``."""
        c = self.config
        lead, each = x.shape[:-1], c.value_heads // c.key_heads
        y = self.in_proj_qkvz(x).reshape(*lead, c.key_heads, 2 * c.key_dim + 2 * each * c.value_dim)
        at = (c.key_dim, 2 * c.key_dim, 2 * c.key_dim + each * c.value_dim)
        q, k, v, z = jnp.split(y, at, axis=-1)
        b, a = jnp.split(self.in_proj_ba(x).reshape(*lead, c.key_heads, 2 * each), 2, axis=-1)
        b, a = (t.reshape(*lead, c.value_heads).astype(jnp.float32) for t in (b, a))
        rate = jnp.exp(self.A_log.get_value().astype(jnp.float32))
        log_decay = -rate * jax.nn.softplus(a + self.dt_bias.get_value().astype(jnp.float32))
        mixed = jnp.concatenate([t.reshape(*lead, -1) for t in (q, k, v)], axis=-1)
        return mixed, z.reshape(*lead, c.value_heads, c.value_dim), jax.nn.sigmoid(b), log_decay

    def convolve(
        self, mixed: jax.Array, before: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Queries and keys ``[B, T, key_heads, key_dim]``, values, and what to keep of rows of ``lengths [B]``."""
        c, length = self.config, mixed.shape[1]
        seen = jnp.concatenate([before.astype(mixed.dtype), mixed], axis=1)
        kernel = self.conv.get_value()[:, 0]
        y = sum(seen[:, i : i + length] * kernel[:, i] for i in range(c.window))
        y = jax.nn.silu(y)
        keys = c.key_heads * c.key_dim
        q, k, v = jnp.split(y, (keys, 2 * keys), axis=-1)
        q, k = (t.reshape(*t.shape[:-1], c.key_heads, c.key_dim) for t in (q, k))
        last = lengths[:, None] + jnp.arange(c.window - 1)
        kept = jnp.take_along_axis(seen, last[..., None], axis=1)
        return q, k, v.reshape(*v.shape[:-1], c.value_heads, c.value_dim), kept


def delta_rule(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, beta: jax.Array, memory: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule: at each token ``M <- exp(log_decay) M``, ``M <- M + beta k (v - k M)``, out ``q M``.

    Queries and keys are divided by their lengths, queries also by ``sqrt(key_dim)``. Tokens are taken
    `CHUNK` at a time: within a chunk the updates are the solution of a triangular system.

    Args:
      q, k: ``[B, T, key_heads, key_dim]``; each serves consecutive value heads.
      v: ``[B, T, value_heads, value_dim]``.
      log_decay, beta: float32 ``[B, T, value_heads]``.
      memory: float32 ``[B, value_heads, key_dim, value_dim]``.

    Returns:
      float32 ``[B, T, value_heads, value_dim]``, and the memory after the last token.
    """
    length, heads = v.shape[1:3]
    q, k = (jnp.repeat(_unit(t), heads // t.shape[2], axis=2) for t in (q, k))
    q = q * q.shape[-1] ** -0.5
    size = min(CHUNK, length)
    parts = -(-length // size)

    def chunks(t: jax.Array) -> jax.Array:  # [B, T, H, ...] -> [parts, B, H, size, ...]
        t = jnp.pad(t.astype(jnp.float32), [(0, 0), (0, parts * size - length), *[(0, 0)] * (t.ndim - 2)])
        t = t.reshape(t.shape[0], parts, size, *t.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(t, 1, 0), 3, 2)

    q, k, v, log_decay, beta = (chunks(t) for t in (q, k, v, log_decay, beta[..., None]))
    total = jnp.cumsum(log_decay, axis=-1)
    causal = jnp.tril(jnp.ones((size, size), bool))
    between = jnp.exp(jnp.where(causal, total[..., :, None] - total[..., None, :], -jnp.inf))
    since_start, until_end = jnp.exp(total)[..., None], jnp.exp(total[..., -1:] - total)[..., None]
    learned = jnp.einsum("...id,...jd->...ij", k * beta, k) * between
    writes = jnp.concatenate([v * beta, k * beta * since_start], axis=-1)
    solved = solve_triangular(learned, writes, lower=True, unit_diagonal=True) if size > 1 else writes
    values, reads = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    attention = jnp.einsum("...id,...jd->...ij", q, k) * between
    whole = jnp.exp(total[..., -1])[..., None, None]

    def chunk(memory: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        values, reads, attention, q, k, whole = xs
        new = values - reads @ memory
        return memory * whole + jnp.swapaxes(k, -1, -2) @ new, q @ memory + attention @ new

    memory, out = jax.lax.scan(chunk, memory, (values, reads, attention, q * since_start, k * until_end, whole))
    out = jnp.moveaxis(jnp.moveaxis(out, 2, 3), 0, 1)  # [B, parts, size, H, value_dim]
    return out.reshape(out.shape[0], parts * size, *out.shape[3:])[:, :length], memory


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + NORM_EPS)
