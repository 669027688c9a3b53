"""`bind`: unmodified Linen, NNX and plain-function models on packed parameters."""

from __future__ import annotations

import functools
import gc
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from quant_helpers import assert_bitwise, dense, random_like

from awq_jax import paths
from awq_jax.errors import BackendError, ShapeError
from awq_jax.nnx import functional
from awq_jax.trace.bind import bind
from awq_jax.trainable import merge, split

D = 32


def packed(params, axes=None, default="kn", **options):
    """Every leaf whose path contains "kernel" (or a key of ``axes``) replaced by a random packed weight."""
    axes = axes or {}

    def one(path, leaf):
        role = next((a for part, a in axes.items() if part in path), default if "kernel" in path else None)
        return random_like(leaf, role, seed=len(path), **options) if role else leaf

    return paths.map_with_path(one, params)


def data(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def close(got, want, tol=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tol, atol=tol)


class Block(nn.Module):
    """Attention with DenseGeneral, a gated MLP, dropout."""

    @nn.compact
    def __call__(self, x, train=True):
        h = nn.LayerNorm()(x)
        q, k, v = (nn.DenseGeneral((2, 16), use_bias=n == "v", name=n)(h) for n in "qkv")
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4)
        x = x + nn.DenseGeneral(D, axis=(-2, -1), name="o")(jnp.einsum("bhqk,bkhd->bqhd", a, v))
        h = nn.RMSNorm()(x)
        h = nn.silu(nn.Dense(48, name="gate")(h)) * nn.Dense(48, name="up")(h)
        return x + nn.Dropout(0.5, deterministic=not train)(nn.Dense(D, name="down")(h))


class Scanned(nn.Module):
    """Tied embedding, scanned and rematerialised blocks."""

    remat: bool = False

    @nn.compact
    def __call__(self, tokens, train=False):
        embed = nn.Embed(24, D, name="embed")
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        body = nn.scan(
            lambda m, x, _: (m(x, train), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = body(block(name="blocks"), embed(tokens), None)
        return embed.attend(x)


BLOCK_AXES = {"q/kernel": "knn", "k/kernel": "knn", "v/kernel": "knn", "o/kernel": "kkn"}
SCAN_AXES = {"embed/embedding": "nk", **{k: "b" + v for k, v in BLOCK_AXES.items()}}
TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, 24, (2, 5)))


@functools.cache
def scanned(remat=False):
    model = Scanned(remat)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)
    return model, packed(params, SCAN_AXES, default="bkn")


@functools.cache
def block():
    model = Block()
    return model, packed(jax.jit(model.init, static_argnums=2)(jax.random.key(0), data(1, 2, D), False), BLOCK_AXES)


def test_linen_flags_keyword_arguments_and_rngs():
    model, params = block()
    x = data(2, 5, D)
    run, plain = bind(model.apply), jax.jit(model.apply, static_argnames="train")
    tol = 5e-5  # results are as large as 45
    close(run(params, x, train=False), plain(dense(params), x, train=False), tol)
    rngs = {"dropout": jax.random.key(7)}
    noisy = run(params, x, rngs=rngs)
    close(noisy, plain(dense(params), x, rngs=rngs), tol)
    assert np.abs(noisy - run(params, x, train=False)).max() > 0.1, "train=True and train=False are two programs"


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_linen_with_stacked_packed_layers(remat):
    model, params = scanned(remat)
    run = bind(model.apply)
    want = jax.jit(model.apply)(dense(params), TOKENS)
    close(jax.jit(run, static_argnames="train")(params, TOKENS, train=False), want, 1e-4)


def test_packed_matmuls_run_packed_not_dequantized_up_front():
    model, params = scanned()
    text = str(jax.make_jaxpr(bind(model.apply, impl="xla"))(params, TOKENS))
    stacked = [tuple(x.shape) for p, x in paths.flatten(params).items() if "gate/kernel" in p]
    assert stacked == [(3, D, 48)]
    assert f"f32[3,{D},48]" not in text, "a stack of layers is dequantized one layer at a time"
    assert f"f32[{D},48]" in text


def raw(model):
    """The whole state as NumPy arrays, rng keys included."""
    state = nnx.state(model)
    return jax.tree.map(
        lambda a: np.array(jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a), state
    )


OLD_XLA = pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="XLA:CPU of jax 0.10 ignores the barrier")


@OLD_XLA
@pytest.mark.parametrize("rows", [1, 100])
def test_unrolled_layers_are_not_all_dequantized_at_once(rows):
    layers = [{"kernel": jnp.zeros((128, 128))} for _ in range(8)]

    def fn(params, x):
        for p in params:
            x = jnp.tanh(x @ p["kernel"])
        return x

    compiled = jax.jit(bind(fn)).lower(packed(layers), jnp.ones((rows, 128))).compile()
    one = 4 * 128 * 128
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * one + 4 * one * rows / 100


def test_nnx_model():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(2)])
            self.norm = nnx.BatchNorm(D, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.out = nnx.LinearGeneral(D, (2, 3), rngs=rngs)

        def __call__(self, x):
            for layer in self.layers:
                x = self.drop(jnp.tanh(layer(x)))
            return self.out(self.norm(x))

        def features(self, x, *, scale):
            return self.layers[0](x) * scale

    model = Net(nnx.Rngs(0))
    before = raw(model)
    apply_fn, params = functional(model)
    params = packed(params, {"out/kernel": "knn"})
    run, x = bind(apply_fn), data(4, D)
    want = jax.jit(apply_fn)(dense(params), x)
    assert want.shape == (4, 2, 3)
    close(run(params, x), want)
    close(run(params, x), want)  # nothing of the first call is left behind
    close(jax.jit(run)(params, x), want)
    assert_bitwise(raw(model), before)
    other, _ = functional(model, "features")
    close(bind(other)(params, x, scale=2.0), 2 * (x @ dense(params)["layers"][0]["kernel"].get_value()))


def moe(params, x):
    gates = jax.nn.softmax(x @ params["router"])
    h = jax.nn.relu(jnp.einsum("td,edf->etf", x, params["wi"]))
    return jnp.einsum("te,etd->td", gates, jnp.einsum("etf,efd->etd", h, params["wo"]))


def test_plain_function_with_experts_and_vmap_over_the_batch():
    params = {"router": data(D, 3), "wi": data(3, D, 48, seed=1), "wo": data(3, 48, D, seed=2)}
    params = packed(params, {"wi": "bkn", "wo": "bkn"}, symmetric=True)
    run, x = bind(moe), data(2, 5, D)
    want = jax.vmap(moe, (None, 0))(dense(params), x)
    close(jax.vmap(run, (None, 0))(params, x), want, 1e-4)
    close(jax.jit(jax.vmap(run, (None, 0)))(params, x), want, 1e-4)


def test_gradients_for_inputs_and_for_the_float_parameters():
    model, params = block()
    run, x = bind(model.apply), data(2, 3, D)

    def loss(fn, p, x):
        return (fn(p, x, train=False) ** 2).sum()

    float_grad = jax.jit(jax.grad(functools.partial(loss, model.apply), argnums=(0, 1)))(dense(params), x)
    close(jax.grad(lambda x: loss(run, params, x))(x), float_grad[1], 1e-3)
    floats, rest = split(params)
    assert len(paths.flatten(floats)) + len(paths.flatten(rest)) == len(paths.flatten(params))
    assert_bitwise(merge(floats, rest), params)
    got = jax.jit(jax.grad(lambda f: loss(run, merge(f, rest), x)))(floats)
    want = jax.tree.map(lambda f, g: None if f is None else g, floats, float_grad[0], is_leaf=lambda f: f is None)
    assert "params/v/bias" in paths.flatten(got)
    assert not any("kernel" in p for p in paths.flatten(got))
    close(got, want, 1e-3)
    whole = jax.jit(jax.grad(lambda p: loss(run, p, x), allow_int=True))(params)
    assert whole["params"]["up"]["kernel"].qweight.dtype == jax.dtypes.float0
    close(split(whole)[0], got, 1e-3)


def test_merge_refuses_trees_that_are_not_halves():
    _, params = block()
    floats, rest = split(params)
    with pytest.raises(ShapeError, match="both"):
        merge(floats, floats)
    with pytest.raises(ShapeError, match="halves"):
        merge(floats, {"other": 1, **rest})


def test_mixed_precision():
    def fn(params, x):
        return jnp.dot(
            x.astype(jnp.bfloat16), params["kernel"].astype(jnp.bfloat16), preferred_element_type=jnp.float32
        )

    params = packed({"kernel": data(D, 8)})
    y = bind(fn)(params, data(3, D))
    assert y.dtype == jnp.float32
    close(y, fn(dense(params), data(3, D)), 2e-2)
    assert np.abs(y - y.astype(jnp.bfloat16)).max() > 0, "the result was not rounded to bfloat16 on the way"


class Cell(nn.Module):
    """One decode step with a cache."""

    @nn.compact
    def __call__(self, x):
        cache = self.variable("cache", "sum", jnp.zeros, x.shape)
        if not self.is_initializing():
            cache.value = cache.value + nn.Dense(D, name="up")(x)
        else:
            nn.Dense(D, name="up")(x)
        return jnp.tanh(nn.Dense(D, name="down")(cache.value))


@functools.cache
def cell():
    model, x = Cell(), data(2, D)
    variables = model.init(jax.random.key(0), x)
    return model, {"params": packed(variables["params"])}, variables["cache"], x


def test_mutable_collections():
    model, params, cache, x = cell()
    y, new = bind(model.apply)({**params, "cache": cache}, x, mutable=["cache"])
    want, new_want = model.apply({**dense(params), "cache": cache}, x, mutable=["cache"])
    close((y, new), (want, new_want))


def test_decode_loops_and_a_donated_cache():
    model, params, cache, x = cell()
    step = bind(lambda p, cache, x: model.apply({**p, "cache": cache}, x, mutable="cache"))

    def by_hand(params, steps):
        c, h = cache, x
        for _ in range(steps):
            h, c = model.apply({**params, "cache": c}, h, mutable="cache")
            c = c["cache"]
        return h

    want = by_hand(dense(params), 3)

    def advance(state):
        i, c, h = state
        h, c = step(params, c, h)
        return i + 1, c["cache"], h

    close(jax.lax.while_loop(lambda s: s[0] < 3, advance, (0, cache, x))[2], want)
    close(jax.jit(lambda p: jax.lax.fori_loop(0, 3, lambda _, s: advance(s), (0, cache, x))[2])(params), want)
    close(jax.lax.scan(lambda s, _: (advance(s), None), (0, cache, x), length=3)[0][2], want)

    donating = jax.jit(step, donate_argnums=(1, 2))
    c, h = jax.tree.map(jnp.copy, (cache, x))
    for _ in range(3):
        given = c
        h, c = donating(params, c, h)
        c = c["cache"]
        assert all(a.is_deleted() for a in jax.tree.leaves(given))
    close(h, want)
    assert not any(a.is_deleted() for a in jax.tree.leaves(params))


def test_donating_the_parameters_hands_them_back_unharmed():
    _, params, _, _ = cell()
    copy = jax.tree.map(jnp.copy, params)
    assert_bitwise(jax.jit(lambda p: p, donate_argnums=0)(copy), params)
    assert all(a.is_deleted() for a in jax.tree.leaves(copy))


def counted(traces):
    def fn(params, x, flag=None, **_):
        traces.append((x.shape, flag))
        return x @ params["kernel"]

    return fn


def test_calls_of_the_same_shapes_trace_once():
    params, traces = packed({"kernel": data(D, 8)}), []
    run = bind(counted(traces))
    for seed in range(3):
        run(params, data(2, D, seed=seed))
    other = packed({"kernel": data(D, 8)}, symmetric=False)
    run(other, data(2, D))
    run(params, np.zeros((2, D), np.float32))
    assert len(traces) == 1
    run(params, data(4, D))
    assert len(traces) == 2
    jax.jit(lambda p, x: run(p, x) + run(p, 2 * x))(params, data(2, D))
    assert len(traces) <= 3
    for flag in (1, True, 1.0, 0.0, -0.0, "1", None, (1, None)):
        run(params, data(2, D), flag=flag)
        run(params, data(2, D), flag=flag)
    seen = [f for _, f in traces[-8:]]
    assert [(type(f), repr(f)) for f in seen][:6] == [(type(f), repr(f)) for f in (1, True, 1.0, 0.0, -0.0, "1")]


def test_unhashable_arguments_work():
    class Options:
        __hash__ = None

    params, traces = packed({"kernel": data(D, 8)}), []
    run = bind(counted(traces))
    for _ in range(2):
        close(run(params, data(2, D), flag=Options()), data(2, D) @ dense(params)["kernel"])


@pytest.mark.slow
def test_the_cache_is_bounded_and_dies_with_the_function(monkeypatch):
    monkeypatch.setattr(sys.modules[bind.__module__], "KEPT", 4)

    class Big:
        pass

    params, x = packed({"kernel": data(D, 8)}), data(1, D)
    run = bind(lambda p, x, flag: x @ p["kernel"])
    objects = [Big() for _ in range(6)]
    alive = [weakref.ref(o) for o in objects]
    for o in objects[:2]:
        run(params, x, flag=o)
    # The rest only needs entries, not compilation: tracing to a shape makes one.
    for o in objects[2:]:
        jax.eval_shape(functools.partial(run, flag=o), params, x)
    words = weakref.ref(params["kernel"].qweight)
    del o, objects
    gc.collect()
    assert sum(a() is not None for a in alive) <= 4
    del params
    gc.collect()
    assert words() is None, "the parameters are not kept"
    del run
    gc.collect()
    jax.clear_caches()
    gc.collect()
    assert sum(a() is not None for a in alive) == 0


def test_parameters_without_packed_leaves_go_straight_through():
    traces = []
    params = {"kernel": data(D, 8)}
    run = bind(counted(traces))
    np.testing.assert_array_equal(run(params, data(2, D)), data(2, D) @ params["kernel"])
    run(params, data(2, D))
    assert len(traces) == 2
    assert not isinstance(traces[0], jax.core.Tracer)


def test_a_leaf_read_by_other_things_than_matmuls():
    def fn(p, i):
        return p["table"][i] @ p["table"].T + p["table"].sum()

    params = packed({"table": data(12, D)}, {"table": "nk"})
    close(bind(fn)(params, jnp.asarray([3, 4])), fn(dense(params), jnp.asarray([3, 4])), 1e-4)


def test_errors():
    with pytest.raises(BackendError, match="choose one of"):
        bind(moe, impl="metal")
    params = packed({"router": data(D, 3), "wi": data(3, D, 48), "wo": data(3, 48, D)}, {"wi": "bkn"})
    with pytest.raises(TypeError):
        bind(moe)(params, data(2, D + 1))


def test_keeps_the_signature():
    run = bind(moe)
    assert run.__name__ == "moe"
    assert run.__wrapped__ is moe
