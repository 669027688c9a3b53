"""Models that keep many weights in one parameter, and take them out in every way that people do."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import user_models
from user_models import HD, Case, D, E, F, H, LinenBlock, V, attend_repeat

N = 2  # layers
X = np.random.default_rng(1).normal(size=(2, 5, D)).astype(np.float32)
norm, params = user_models._norm, user_models._params


def scan_axis_1() -> Case:
    """`nn.scan` over axis 1 of the parameters, the default of MaxText and T5X."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            x = nn.Embed(V, D, name="embed")(tokens)
            block = nn.scan(LinenBlock, variable_axes={"params": 1}, split_rngs={"params": True}, length=N)
            x, _ = block(attend_repeat, scanned=True, name="layers")(x, None)
            return nn.Dense(V, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))

    groups = user_models._llama_groups("params/layers/{}") | {"params/head/kernel": "params/norm/scale"}
    return user_models._linen(Model(), groups)


def _block(p: Any, x: jax.Array) -> jax.Array:
    h = norm(x, p["norm"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def _layers(*lead: int) -> Any:
    return params(norm=(*lead, D), gate=(*lead, D, F), up=(*lead, D, F), down=(*lead, F, D)) | params(head=(D, V))


BLOCK_GROUPS = {"gate up": "norm", "down": "up"}


def while_counter() -> Case:
    """A while loop whose counter alone says when it ends, and slices the weights along their last axis."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        def step(s: Any) -> Any:
            i, x = s
            w = {"norm": p["norm"][i]} | {k: jnp.take(p[k], i, axis=-1) for k in ("gate", "up", "down")}
            return i + 1, _block(w, x)

        return jax.lax.while_loop(lambda s: s[0] < N, step, (0, x))[1] @ p["head"]

    p = _layers(N)
    p |= {k: jnp.moveaxis(p[k], 0, -1) for k in ("gate", "up", "down")}
    return Case(fn, p, (X,), BLOCK_GROUPS | {"head": "!result of a while"})


def nested_loops() -> Case:
    """The outer loop's counter slices the second axis, the inner one's the first."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        layers = {k: w for k, w in p.items() if k != "head"}

        def inner(i: Any, j: Any, x: jax.Array) -> jax.Array:
            return _block(jax.tree.map(lambda a: a[j, i], layers), x)

        return (
            jax.lax.fori_loop(0, 3, lambda i, x: jax.lax.fori_loop(0, N, functools.partial(inner, i), x), x) @ p["head"]
        )

    return Case(fn, _layers(N, 3), (X,), BLOCK_GROUPS | {"head": "!result of a scan"})


def layers_of_experts() -> Case:
    """Experts come first, scanned layers second."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, w: Any) -> Any:
            h = norm(x, w["norm"])
            a = jax.nn.silu(jnp.einsum("btd,edf->btef", h, w["gate"])) * jnp.einsum("btd,edf->btef", h, w["up"])
            return x + jnp.einsum("btef,efd->btd", a, w["down"]), None

        layers = {k: w if k == "norm" else jnp.moveaxis(w, 1, 0) for k, w in p.items() if k != "head"}
        return jax.lax.scan(step, x, layers)[0] @ p["head"]

    p = params(norm=(N, D), gate=(E, N, D, F), up=(E, N, D, F), down=(E, N, F, D), head=(D, V))
    return Case(fn, p, (X,), BLOCK_GROUPS | {"head": "!result of a scan"})


def layers_by_number() -> Case:
    """A Python loop over stacked layers; the first are scanned, the last stands apart."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        layers = {k: w for k, w in p.items() if k != "head"}
        x, _ = jax.lax.scan(lambda x, w: (_block(w, x), None), x, jax.tree.map(lambda a: a[:N], layers))
        for i in (N, -1):
            x = _block(jax.tree.map(lambda a, i=i: a[i], layers), x)
        return x @ p["head"]

    groups = {f"gate[0:{N}] up[0:{N}]": "!outside the loop", f"down[0:{N}]": "!outside the loop", "head": "!"}
    for i in (N, N + 1):
        groups |= {f"gate[{i}] up[{i}]": "norm", f"down[{i}]": "up"}
    return Case(fn, _layers(N + 2), (X,), groups)


def stacked_gate() -> Case:
    """Gemma's gate and up projection in one parameter, unpacked."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        gate, up = p["gating"]
        h = norm(x, p["norm"])
        return norm((jax.nn.gelu(h @ gate) * (h @ up)) @ p["down"], p["last"]) @ p["head"][:, 0]

    p = params(norm=(D,), gating=(2, D, F), down=(F, D), last=(D,), head=(D, 1, V))
    return Case(fn, p, (X,), {"gating[0] gating[1]": "norm", "down": "gating", "head": "last"})


def split_weights() -> Case:
    """q, k and v are columns of one matrix, cut before they are multiplied; so are two halves of the rows."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        b, t, _ = x.shape
        h = norm(x, p["norm"])
        q, k = (h @ w for w in jnp.split(p["qkv"][:, : 2 * H * HD], 2, axis=1))
        v = norm(x, p["norm_v"]) @ p["qkv"][:, 2 * H * HD :]
        o = attend_repeat(*(a.reshape(b, t, H, HD) for a in (q, k, v))).reshape(b, t, -1) @ p["o"]
        return jnp.tanh(o) @ p["rows"][:D] + jnp.tanh(x) @ p["rows"][D:]

    p = params(norm=(D,), norm_v=(D,), qkv=(D, 3 * H * HD), o=(H * HD, D), rows=(2 * D, V))
    n = H * HD
    groups = {
        f"qkv[:, 0:{n}] qkv[:, {n}:{2 * n}]": "norm",
        f"qkv[:, {2 * n}:{3 * n}]": "norm_v",
        "o": "qkv",
        f"rows[0:{D}]": "!tanh",
        f"rows[{D}:{2 * D}]": "!tanh",
    }
    return Case(fn, p, (X,), groups)


MODELS = {
    f.__name__: functools.cache(f)
    for f in (
        scan_axis_1,
        while_counter,
        nested_loops,
        layers_of_experts,
        layers_by_number,
        stacked_gate,
        split_weights,
    )
}
