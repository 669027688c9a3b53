"""The Linen and NNX layers: flax's own bits with float kernels, `dot` with packed ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from quant_helpers import assert_bitwise, dense, random_like, random_packed

from awq_jax import kernels, paths
from awq_jax.errors import BackendError, ShapeError
from awq_jax.linen import Dense
from awq_jax.nnx import Linear, functional
from awq_jax.qtensor import is_quantized
from awq_jax.serve.dot import dot

D = 32
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, D)), jnp.float32)

OPTIONS = (
    {},
    {"use_bias": False},
    {"dtype": jnp.bfloat16},
    {"param_dtype": jnp.bfloat16, "bias_init": jax.nn.initializers.normal()},
    {"dtype": jnp.float32, "param_dtype": jnp.float16, "precision": "highest"},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_float_kernels_are_flax_bit_for_bit(options):
    ours, flax = Dense(6, **options), nn.Dense(6, **options)
    a, b = (m.init(jax.random.key(1), X) for m in (ours, flax))
    assert_bitwise(a, b)
    assert_bitwise(ours.apply(b, X), flax.apply(b, X))
    ours, flax = Linear(D, 6, rngs=nnx.Rngs(1), **options), nnx.Linear(D, 6, rngs=nnx.Rngs(1), **options)
    a, b = nnx.state(ours), nnx.state(flax)
    assert_bitwise(a, b)
    assert list(paths.flatten(a)) == list(paths.flatten(b))
    assert_bitwise(ours(X), flax(X))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
def test_packed_kernels_are_dot_with_the_dtype_of_the_float_layer(options, x_dtype):
    x = X.astype(x_dtype)
    linen, linear = Dense(6, **options), Linear(D, 6, rngs=nnx.Rngs(1), **options)
    params = linen.init(jax.random.key(1), x)["params"]
    q = random_like(params["kernel"], inv_scale=True)
    bias = params.get("bias")
    want_dtype = linen.apply({"params": params}, x).dtype
    want = kernels.matmul(x.astype(want_dtype), q)
    want = want if bias is None else want + bias.astype(want_dtype)

    got = linen.apply({"params": {**params, "kernel": q}}, x)
    assert want.dtype == want_dtype
    assert_bitwise(got, want)
    if bias is not None:
        linear.bias.set_value(bias)
    assert linear(x).dtype == want_dtype
    linear.kernel.set_value(q)
    assert_bitwise(linear(x), want)
    # The float layer also rounds the weight to its dtype.
    exact = x_dtype == "float32" and "dtype" not in "".join(options)
    float_layer = linen.apply({"params": {**params, "kernel": dense(q)}}, x)
    np.testing.assert_allclose(got.astype("float32"), float_layer.astype("float32"), atol=2e-5 if exact else 0.1)


def test_preferred_element_type():
    linear = Linear(D, 6, use_bias=False, rngs=nnx.Rngs(1), dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
    linear.kernel.set_value(random_packed(D, 6)[0])
    assert linear(X).dtype == jnp.float32


class Layer(nn.Module):
    dense: type[nn.Module]

    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(self.dense(D)(x)), None


class Stack(nn.Module):
    """Scanned and rematerialised layers between two plain ones."""

    dense: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        x = self.dense(D)(x)
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(self.dense, name="layers")(x, None)
        return self.dense(4, use_bias=False, name="head")(x)


def test_linen_scan_remat_and_gradients():
    ours, flax = Stack(Dense), Stack(nn.Dense)
    params = jax.jit(ours.init)(jax.random.key(0), X)
    assert_bitwise(params, jax.jit(flax.init)(jax.random.key(0), X))

    def pack(path, leaf):
        return random_like(leaf, "bkn" if "layers" in path else "kn", seed=len(path)) if "kernel" in path else leaf

    packed = paths.map_with_path(pack, params)
    assert sum(map(is_quantized, paths.flatten(packed).values())) == 3

    def loss(model, p, x):
        return (model.apply(p, x) ** 2).sum()

    value, grad = jax.jit(jax.value_and_grad(lambda x: loss(ours, packed, x)))(X)
    want, want_grad = jax.jit(jax.value_and_grad(lambda x: loss(flax, dense(packed), x)))(X)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=1e-4 * float(jnp.abs(want_grad).max()))
    rows = jax.jit(jax.vmap(lambda x: ours.apply(packed, x)))(X)
    np.testing.assert_allclose(rows, ours.apply(packed, X), rtol=1e-4, atol=1e-4)


def test_linen_partitioned_metadata():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    layer = Dense(8, kernel_init=init)
    variables = layer.init(jax.random.key(0), X)
    boxed = variables["params"]["kernel"]
    q, _ = random_packed(D, 8)
    packed = {"params": {**variables["params"], "kernel": boxed.replace_boxed(q)}}
    assert_bitwise(layer.apply(packed, X), dot(X, q) + variables["params"]["bias"])


class Net(nnx.Module):
    def __init__(self, rngs):
        @nnx.vmap(in_axes=0, out_axes=0)
        def layer(rngs):
            return Linear(D, D, rngs=rngs)

        self.layers = layer(rngs.fork(split=3))
        self.out = Linear(D, 4, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return x + jnp.tanh(layer(x))

        return self.out(run(x, self.layers))


def test_nnx_scan_split_merge_jit_and_grad():
    model = Net(nnx.Rngs(0))
    stacked, _ = random_packed(D, D, batch=(3,))
    model.layers.kernel.set_value(stacked)
    apply_fn, params = functional(model)
    assert is_quantized(paths.flatten(params)["layers/kernel"])
    run = jax.jit(lambda params, x: jax.value_and_grad(lambda x: (apply_fn(params, x) ** 2).sum())(x))
    value, grad = run(params, X)
    want, want_grad = run(dense(params), X)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=1e-4)


def test_layers_refuse_what_does_not_fit():
    q, _ = random_packed(D, 6)
    with pytest.raises(BackendError, match="choose one of"):
        Linear(D, 6, rngs=nnx.Rngs(0), impl="none")
    with pytest.raises(BackendError, match="choose one of"):
        Dense(6, impl="none").init(jax.random.key(0), X)
    with pytest.raises(ShapeError, match=r"layers_0/kernel.*\(32, 6\).*7 features"):
        nn.Sequential([Dense(7)]).apply({"params": {"layers_0": {"kernel": q, "bias": jnp.zeros(7)}}}, X)
    linear = Linear(D, 7, rngs=nnx.Rngs(0))
    linear.kernel.set_value(q)
    with pytest.raises(ShapeError, match=r"\(32, 6\).*from 32 to 7"):
        linear(X)
    with pytest.raises(ShapeError, match=r"\(2, 3, 31\)"):
        Dense(6).apply({"params": {"kernel": q, "bias": jnp.zeros(6)}}, X[..., :31])
