"""The dense half of a layer that has no attention."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from awq_jax.models.config import MLPConfig
from awq_jax.models.layers import fused_columns
from awq_jax.models.layers.linear import Linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
LEARNED = ("xielu",)  # activations with parameters of their own


def gated(gate: jax.Array, up: jax.Array, config: MLPConfig) -> jax.Array:
    """The product of the two halves."""
    if config.limit is None:
        return ACTIVATIONS[config.activation](gate) * up
    gate = jnp.minimum(gate, config.limit)
    up = jnp.clip(up, -config.limit, config.limit)
    return gate * jax.nn.sigmoid(config.steepness * gate) * (up + 1)


class XIELU(nnx.Module):
    """An activation with two learned curvatures (arXiv 2411.13010); ``beta`` and ``eps`` are constants it stores."""

    def __init__(self) -> None:
        self.alpha_p, self.alpha_n = nnx.Param(jnp.zeros(1)), nnx.Param(jnp.zeros(1))
        self.beta, self.eps = nnx.Param(jnp.asarray(0.5)), nnx.Param(jnp.asarray(-1e-6))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Elementwise, ``x`` of any shape."""
        beta, eps = self.beta.get_value(), self.eps.get_value()
        right = jax.nn.softplus(self.alpha_p.get_value()) * x * x
        left = (beta + jax.nn.softplus(self.alpha_n.get_value())) * (jnp.expm1(jnp.minimum(x, eps)) - x)
        return (jnp.where(x > 0, right, left) + beta * x).astype(x.dtype)


class MLP(nnx.Module):
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))``: see `MLPConfig`."""

    def __init__(self, size: int, config: MLPConfig, rngs: nnx.Rngs):
        inner, bias = config.size, config.bias
        if config.gated and config.fused:
            self.gate_up_proj = Linear(size, 2 * inner, use_bias=bias, rngs=rngs)
        else:
            if config.gated:
                self.gate_proj = Linear(size, inner, use_bias=bias, rngs=rngs)
            self.up_proj = Linear(size, inner, use_bias=bias, rngs=rngs)
        self.down_proj = Linear(inner, size, use_bias=bias, rngs=rngs)
        if config.activation in LEARNED:
            self.act_fn = XIELU()
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x [..., hidden]`` to the same shape."""
        if not self.config.gated:
            activation = self.config.activation
            act = self.act_fn if activation in LEARNED else ACTIVATIONS[activation]
            return self.down_proj(act(self.up_proj(x)))
        if self.config.fused:
            gate, up = fused_columns.split(self.gate_up_proj(x), [self.config.size] * 2, self.config.ways)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gated(gate, up, self.config))
