"""Mixtures of experts as people write them, each row going to the experts that a router chose."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import user_models
from stacked_models import X
from user_models import Case, D, E, F, V

norm = user_models._norm
TOP = 2


def _chosen(p: Any, x: jax.Array, top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The normed rows, and the weights and numbers of their experts."""
    h = norm(x.reshape(-1, D), p["norm"])
    return h, *jax.lax.top_k(jax.nn.softmax(h @ p["router"]), top)


def ragged(p: Any, x: jax.Array) -> jax.Array:
    """Rows sorted by expert and `jax.lax.ragged_dot`; down is stored [E, N, K]."""
    h, weight, which = _chosen(p, x, TOP)
    order = jnp.argsort(which.reshape(-1))
    sizes = jnp.bincount(which.reshape(-1), length=E)
    rows = jnp.repeat(h, TOP, axis=0)[order]
    a = jax.nn.silu(jax.lax.ragged_dot(rows, p["gate"], sizes)) * jax.lax.ragged_dot(rows, p["up"], sizes)
    dims = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
    y = jax.lax.ragged_dot_general(a, p["down"].swapaxes(1, 2), sizes, dims)
    y = jnp.zeros_like(y).at[order].set(y).reshape(-1, TOP, D)
    return (y * weight[..., None]).sum(1) @ p["head"]


def gathered(p: Any, x: jax.Array) -> jax.Array:
    """The weights of each token's experts are taken out."""
    h, weight, which = _chosen(p, x, TOP)
    gate, up = (jnp.einsum("td,tkdf->tkf", h, p[n][which]) for n in ("gate", "up"))
    y = jnp.einsum("tkf,tkfd->tkd", jax.nn.silu(gate) * up, jnp.take(p["down"], which, axis=0))
    return (y * weight[..., None]).sum(1) @ p["head"]


def one_hot(p: Any, x: jax.Array) -> jax.Array:
    """A product with a one-hot matrix picks the weights."""
    h, weight, which = _chosen(p, x, 1)
    pick = jax.nn.one_hot(which[:, 0], E)
    gate, up, down = (jnp.einsum("te,ekn->tkn", pick, p[n]) for n in ("gate", "up", "down"))
    a = jax.nn.silu(jnp.einsum("td,tdf->tf", h, gate)) * jnp.einsum("td,tdf->tf", h, up)
    return (jnp.einsum("tf,tfd->td", a, down) * weight) @ p["head"]


def vmapped(p: Any, x: jax.Array) -> jax.Array:
    """A function of one token, mapped over tokens."""
    h, weight, which = _chosen(p, x, 1)

    def one(h: jax.Array, e: jax.Array) -> jax.Array:
        return (jax.nn.silu(h @ p["gate"][e]) * (h @ p["up"][e])) @ p["down"][e]

    return (jax.vmap(one)(h, which[:, 0]) * weight) @ p["head"]


FORMS = {f.__name__: f for f in (ragged, gathered, one_hot, vmapped)}


def case(name: str) -> Case:
    """One of `FORMS`."""
    shapes = {"norm": (D,), "router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D), "head": (D, V)}
    groups = {
        "router": "=gate",
        "gate up": "norm",
        "down": "up",
        "head": "down",
    }
    return Case(FORMS[name], user_models._params(**shapes), (X,), groups)


MODELS = {f"experts_{name}": functools.cache(functools.partial(case, name)) for name in FORMS}
