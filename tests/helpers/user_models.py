"""Models written the way users write them, with the scale groups a person would name for each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

D, H, KV, HD, F, V, L, E = 16, 4, 2, 4, 24, 32, 2, 3
TOKENS = np.random.default_rng(0).integers(0, V, (2, 5)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and what discovery must say about it.

    Attributes:
      groups: sites (space separated) -> absorbers (space separated), "!" and a part of the reason, or "=" and the
        group whose scale is taken.
      skipped: path -> part of the reason.
    """

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    groups: dict[str, str]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)


def _random(params: Any, seed: int = 3) -> Any:
    """Every parameter random, so that no bias is zero and no norm weight is one."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)

    def draw(x: Any) -> jax.Array:
        fan = x.shape[-2] if x.ndim > 1 else 1
        return jnp.asarray(rng.normal(size=x.shape) / fan**0.5 + (0.3 if x.ndim < 3 else 0.0), jnp.float32)

    return jax.tree.unflatten(tree, [draw(x) for x in leaves])


def _causal(t: int) -> jax.Array:
    return jnp.tril(jnp.ones((t, t), bool))


def rope(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None, None] * 100.0 ** (-jnp.arange(half) / half)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)


def attend_repeat(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    k, v = (jnp.repeat(a, H // a.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / HD**0.5
    p = jax.nn.softmax(jnp.where(_causal(q.shape[1]), scores, -1e9), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", p, v)


def attend_grouped(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    b, t = q.shape[:2]
    q = q.reshape(b, t, KV, H // KV, HD)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k) / HD**0.5
    p = jax.nn.softmax(jnp.where(_causal(t), scores, -1e9), axis=-1)
    return jnp.einsum("bkgts,bskd->btkgd", p, v).reshape(b, t, H, HD)


def attend_library(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


# ----------------------------------------------------------------------------------- Linen


class LinenBlock(nn.Module):
    """A Llama block; with ``scanned`` it has the signature `nn.scan` wants."""

    attend: Callable[..., jax.Array]
    bias: bool = False
    scanned: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> Any:
        b, t, _d = x.shape
        h = nn.RMSNorm(name="norm1")(x)
        q = nn.Dense(H * HD, use_bias=self.bias, name="q")(h).reshape(b, t, H, HD)
        k = nn.Dense(KV * HD, use_bias=self.bias, name="k")(h).reshape(b, t, KV, HD)
        v = nn.Dense(KV * HD, use_bias=self.bias, name="v")(h).reshape(b, t, KV, HD)
        o = self.attend(rope(q), rope(k), v).reshape(b, t, H * HD)
        x = x + nn.Dense(D, use_bias=False, name="o")(o)
        h = nn.RMSNorm(name="norm2")(x)
        gate = nn.Dense(F, use_bias=False, name="gate")(h)
        up = nn.Dense(F, use_bias=self.bias, name="up")(h)
        x = x + nn.Dense(D, use_bias=False, name="down")(nn.silu(gate) * up)
        return (x, None) if self.scanned else x


class LinenLM(nn.Module):
    scan: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(V, D, name="embed")(tokens)
        if self.scan:
            block = nn.scan(nn.remat(LinenBlock), variable_axes={"params": 0}, split_rngs={"params": True}, length=L)
            x, _ = block(attend_grouped, scanned=True, name="layers")(x, None)
        else:
            for i in range(L):
                x = LinenBlock(attend_repeat, bias=True, name=f"layer{i}")(x)
        return nn.Dense(V, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


class GemmaNorm(nn.Module):
    """Stores its weight less one."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        w = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + 1e-6)
        return (h * (1 + w)).astype(x.dtype)


class GemmaLM(nn.Module):
    """`DenseGeneral` projections, `1 + w` norms, gelu gate, the embedding as the head."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(V, D, name="embed")
        x = embed(tokens) * D**0.5
        h = GemmaNorm(name="norm1")(x)
        q = nn.DenseGeneral((H, HD), use_bias=False, name="q")(h)
        k = nn.DenseGeneral((KV, HD), use_bias=False, name="k")(h)
        v = nn.DenseGeneral((KV, HD), name="v")(h)
        x = x + nn.DenseGeneral(D, axis=(-2, -1), use_bias=False, name="o")(attend_library(q, k, v))
        h = GemmaNorm(name="norm2")(x)
        gate, up = nn.Dense(F, name="gate")(h), nn.Dense(F, name="up")(h)
        x = x + nn.Dense(D, name="down")(nn.gelu(gate) * up)
        return embed.attend(GemmaNorm(name="norm")(x))


def _linen(model: nn.Module, groups: dict[str, str], skipped: dict[str, str] | None = None) -> Case:
    params = _random(jax.eval_shape(model.init, jax.random.key(0), TOKENS))
    return Case(model.apply, params, (TOKENS,), groups, skipped or {})


def _llama_groups(prefix: str, bias: str = "") -> dict[str, str]:
    """The four groups of a Llama block; ``{}`` in the template is the parameter's name."""

    def names(words: str) -> str:
        return " ".join(prefix.format(w) for w in words.split())

    return {
        names("q/kernel k/kernel v/kernel"): names("norm1/scale"),
        names("o/kernel"): names("v/kernel" + (" v/bias" if bias else "")),
        names("gate/kernel up/kernel"): names("norm2/scale"),
        names("down/kernel"): names("up/kernel" + (" up/bias" if bias else "")),
    }


def linen_unrolled() -> Case:
    groups = _llama_groups("params/layer0/{}", "bias") | _llama_groups("params/layer1/{}", "bias")
    return _linen(LinenLM(), groups | {"params/head/kernel": "params/norm/scale"})


def linen_scan_remat() -> Case:
    return _linen(LinenLM(scan=True), _llama_groups("params/layers/{}") | {"params/head/kernel": "params/norm/scale"})


def linen_gemma() -> Case:
    return _linen(
        GemmaLM(),
        {
            "params/q/kernel params/k/kernel params/v/kernel": "params/norm1/scale",
            "params/o/kernel": "params/v/kernel params/v/bias",
            "params/gate/kernel params/up/kernel": "params/norm2/scale",
            "params/down/kernel": "params/up/kernel params/up/bias",
        },
        {"params/embed/embedding": "tied embedding"},
    )


# ------------------------------------------------------------------------------------- NNX


class NeoxBlock(nnx.Module):
    """One LayerNorm feeds attention and MLP; the MLP is plain with gelu."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.q, self.k, self.v = (nnx.Linear(D, H * HD, rngs=rngs) for _ in range(3))
        self.o = nnx.Linear(H * HD, D, rngs=rngs)
        self.up, self.down = nnx.Linear(D, F, rngs=rngs), nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, t, _ = x.shape
        h = self.norm(x)
        q, k, v = (p(h).reshape(b, t, H, HD) for p in (self.q, self.k, self.v))
        o = attend_repeat(rope(q), rope(k), v).reshape(b, t, -1)
        return x + self.o(o) + self.down(jax.nn.gelu(self.up(h)))


class ReluBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        self.up, self.down = nnx.Linear(D, F, rngs=rngs), nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jax.nn.relu(self.up(self.norm(x))))


class NnxLM(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, scan: bool):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        self.head = nnx.Linear(D, V, use_bias=False, rngs=rngs)
        self.scan = scan
        self.layers: Any
        if scan:

            @nnx.split_rngs(splits=L)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def make(rngs: nnx.Rngs) -> ReluBlock:
                return ReluBlock(rngs)

            self.layers = make(rngs)
        else:
            self.layers = nnx.List([NeoxBlock(rngs) for _ in range(L)])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        if self.scan:

            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def forward(x: jax.Array, block: ReluBlock) -> jax.Array:
                return block(x)

            x = forward(x, self.layers)
        else:
            for block in self.layers:
                x = block(x)
        return self.head(self.norm(x))


def _nnx(scan: bool, groups: dict[str, str]) -> Case:
    graph, state = nnx.split(NnxLM(nnx.Rngs(0), scan))
    return Case(lambda state, tokens: nnx.merge(graph, state)(tokens), _random(state), (TOKENS,), groups)


def nnx_unrolled() -> Case:
    groups = {"head/kernel": "norm/scale"}
    for i in range(L):
        p = f"layers/{i}"
        groups |= {
            f"{p}/q/kernel {p}/k/kernel {p}/v/kernel {p}/up/kernel": f"{p}/norm/scale {p}/norm/bias",
            f"{p}/o/kernel": f"{p}/v/kernel {p}/v/bias",
            f"{p}/down/kernel": "!gelu",
        }
    return _nnx(False, groups)


def nnx_scan() -> Case:
    return _nnx(
        True,
        {
            "layers/up/kernel": "layers/norm/scale",
            "layers/down/kernel": "layers/up/kernel layers/up/bias",
            "head/kernel": "norm/scale",
        },
    )


# ------------------------------------------------------------------------- plain functions


def _norm(x: jax.Array, w: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * w


def _params(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    return _random({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()})


def moe_einsum() -> Case:
    """Every expert runs on every token; the router's weights combine them. PyTorch-style head."""

    def fn(p: Any, tokens: jax.Array) -> jax.Array:
        x = p["embed"][tokens]
        h = _norm(x, p["norm"])
        route = jax.nn.softmax(h @ p["router"])
        a = jax.nn.silu(jnp.einsum("btd,edf->btef", h, p["gate"])) * jnp.einsum("btd,edf->btef", h, p["up"])
        y = jnp.einsum("btef,efd->bted", a, p["down"])
        x = x + jnp.einsum("bted,bte->btd", y, route)
        return _norm(x, p["last"]) @ p["head"].T

    params = _params(
        embed=(V, D), norm=(D,), router=(D, E), gate=(E, D, F), up=(E, D, F), down=(E, F, D), last=(D,), head=(V, D)
    )
    return Case(fn, params, (TOKENS,), {"router gate up": "norm", "down": "up", "head": "last"})


def shared_loop() -> Case:
    """One block applied three times (`fori_loop`), then a head."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        def step(_: Any, x: jax.Array) -> jax.Array:
            h = _norm(x, p["norm"])
            return x + (jax.nn.sigmoid(h @ p["gate"]) * (h @ p["up"])) @ p["down"]

        return jax.lax.fori_loop(0, 3, step, x) @ p["head"]

    x = np.random.default_rng(1).normal(size=(2, 5, D)).astype(np.float32)
    params = _params(norm=(D,), gate=(D, F), up=(D, F), down=(F, D), head=(D, V))
    return Case(fn, params, (x,), {"gate up": "norm", "down": "up", "head": "!result of a scan"})


def while_loop() -> Case:
    """A loop whose length depends on the data: its activations cannot be collected."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        def step(s: Any) -> Any:
            i, x = s
            return i + 1, x + jnp.tanh(_norm(x, p["norm"]) @ p["up"]) @ p["down"]

        _, x = jax.lax.while_loop(lambda s: (s[0] < 3) & (jnp.abs(s[1]).max() < 1e6), step, (0, x))
        return _norm(x, p["last"]) @ p["head"]

    x = np.random.default_rng(1).normal(size=(2, 5, D)).astype(np.float32)
    params = _params(norm=(D,), up=(D, F), down=(F, D), last=(D,), head=(D, V))
    return Case(fn, params, (x,), {"head": "last"}, {"up": "while", "down": "while"})


def cached_decode() -> Case:
    """A step with a key-value cache: the values come out of the cache, not of this step."""

    def fn(p: Any, x: jax.Array, cache: jax.Array) -> Any:
        h = _norm(x, p["norm"])
        q, k, v = h @ p["q"], h @ p["k"], h @ p["v"]
        cache = jax.lax.dynamic_update_slice(cache, jnp.stack([k, v]), (0, 0, 3, 0))
        probs = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, cache[0]))
        return jnp.einsum("bts,bsd->btd", probs, cache[1]) @ p["o"], cache

    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 1, D)).astype(np.float32)
    cache = rng.normal(size=(2, 2, 8, D)).astype(np.float32)
    params = _params(norm=(D,), q=(D, D), k=(D, D), v=(D, D), o=(D, D))
    return Case(fn, params, (x, cache), {"q k v": "norm", "o": "!the model's input"})


def fused_splits() -> Case:
    """q, k, v and gate, up each from one matrix, split afterwards."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        b, t, _ = x.shape
        qkv = _norm(x, p["norm1"]) @ p["qkv"] + p["qkv_bias"]
        q, k, v = (a.reshape(b, t, H, HD) for a in jnp.split(qkv, 3, axis=-1))
        x = x + attend_repeat(rope(q), rope(k), v).reshape(b, t, -1) @ p["o"]
        gate_up = _norm(x, p["norm2"]) @ p["gate_up"]
        return x + (jax.nn.silu(gate_up[..., :F]) * gate_up[..., F:]) @ p["down"]

    x = np.random.default_rng(1).normal(size=(2, 5, D)).astype(np.float32)
    params = _params(
        norm1=(D,),
        qkv=(D, 3 * H * HD),
        qkv_bias=(3 * H * HD,),
        o=(H * HD, D),
        norm2=(D,),
        gate_up=(D, 2 * F),
        down=(F, D),
    )
    return Case(fn, params, (x,), {"qkv": "norm1", "o": "qkv qkv_bias", "gate_up": "norm2", "down": "gate_up"})


def refusals() -> Case:
    """Small traps: each looks foldable and is not."""

    def fn(p: Any, x: jax.Array) -> Any:
        leaked = _norm(x, p["n1"])  # also feeds the residual
        y = leaked + leaked @ p["w1"]
        y = y + jnp.concatenate([_norm(y, p["n2"]) @ p["w2"], _norm(y, p["n2"]) @ p["w3"]], -1)  # one norm, two inputs
        y = y + jnp.square(jax.nn.relu(y @ p["w4"])) @ p["w5"]  # square is not homogeneous of degree 1
        both = y @ p["w6"]
        y = y + (both * both) @ p["w7"]  # a product of a value with itself scales twice
        y = y + _norm(y, p["n8"]) @ (p["a"] @ p["b"])  # two parameters multiplied
        hidden = _norm(y, p["n9"])
        return hidden @ p["w9"], hidden  # the scaled value is an output

    x = np.random.default_rng(1).normal(size=(2, 5, D)).astype(np.float32)
    half = D // 2
    params = _params(
        n1=(D,), w1=(D, D), n2=(D,), w2=(D, half), w3=(D, half), w4=(D, F), w5=(F, D), w6=(D, F), w7=(F, D),
        n8=(D,), a=(D, 4), b=(4, D), n9=(D,), w9=(D, V),
    )  # fmt: skip
    groups = {
        "w1": "!also used by add (user_models.py:",
        "w2": "!n2 is also used by",
        "w3": "!n2 is also used by",
        "w4": "!the scaled value is also used by",
        "w5": "!square",
        "w6": "!the scaled value is also used by",
        "w7": "!also used by mul",
        "w9": "!also an output",
    }
    return Case(fn, params, (x,), groups, {"a": "another parameter", "b": "another parameter"})


MODELS = {
    f.__name__: functools.cache(f)
    for f in (
        linen_unrolled,
        linen_scan_remat,
        linen_gemma,
        nnx_unrolled,
        nnx_scan,
        moe_einsum,
        shared_loop,
        while_loop,
        cached_decode,
        fused_splits,
        refusals,
    )
}
