"""Adapters beside the weights of any model: values, gradients and initial factors against NumPy in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import awq_jax
from awq_jax import errors, lora, paths, trainable
from awq_jax.lora.error_init import weighted
from awq_jax.plan import fold
from awq_jax.plan.folded import channel_scales
from awq_jax.qtensor import QuantizedTensor

K, N, ROWS = 32, 48, 96
X = np.random.default_rng(0).normal(size=(ROWS, K)).astype(np.float32)
SETTINGS = {"bits": 4, "group_size": 16, "progress": False}


class Net(nn.Module):
    """Two layers that are scanned, with a norm before each."""

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                h = nn.Dense(N, use_bias=False, name="up")(nn.RMSNorm()(x))
                return x + nn.Dense(K, use_bias=False, name="down")(nn.silu(h)), None

        x, _ = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="layers")(
            x, None
        )
        return x


@pytest.fixture(scope="module")
def scanned():
    model = Net()
    params = model.init(jax.random.key(0), X)
    calib = awq_jax.calibrate(model.apply, params, [X], progress=False)
    packed, report = awq_jax.quantize(params, calib, return_report=True, **SETTINGS)
    return model.apply, params, calib, packed, report


def drawn(adapters, seed=1):
    """The same tree with numbers in it, as training would leave them."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 8, jnp.float32), adapters)


def merged(params, adapters, scale):
    """The float model with the product added to its weights, in float64 on the host."""
    flat = paths.flatten(adapters)

    def one(path, leaf):
        w = leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf
        if f"{path}/lora_a" not in flat:
            return w
        a, b = (np.asarray(flat[f"{path}/lora_{x}"], np.float64) for x in "ab")
        return jnp.asarray(np.asarray(w, np.float64) + scale * (a @ b).reshape(w.shape), w.dtype)

    return paths.map_with_path(one, params)


@pytest.mark.parametrize("which", ["packed", "float"])
def test_of_a_scanned_linen_model(scanned, which):
    apply_fn, params, calib, packed, _ = scanned
    own = packed if which == "packed" else params
    apply, adapters, frozen = lora.add(apply_fn, own, rank=4, alpha=6, calib=None if which == "packed" else calib)
    assert {p: a.shape for p, a in paths.flatten(adapters).items()} == {
        "params/layers/up/kernel/lora_a": (2, K, 4),
        "params/layers/up/kernel/lora_b": (2, 4, N),
        "params/layers/down/kernel/lora_a": (2, N, 4),
        "params/layers/down/kernel/lora_b": (2, 4, K),
    }
    run = awq_jax.bind(apply_fn)
    np.testing.assert_allclose(apply(adapters, frozen, X), run(own, X), atol=1e-5)  # B is 0
    adapters = drawn(adapters)
    dense = merged(own, adapters, 6 / 4)
    np.testing.assert_allclose(apply(adapters, frozen, X), apply_fn(dense, X), atol=2e-4)

    def loss(adapters):
        return jnp.sum(apply(adapters, frozen, X) ** 2)

    def reference(adapters):
        def one(path, leaf):
            w = leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf
            at = paths.flatten(adapters)
            return w if f"{path}/lora_a" not in at else w + 1.5 * at[f"{path}/lora_a"] @ at[f"{path}/lora_b"]

        return jnp.sum(apply_fn(paths.map_with_path(one, own), X) ** 2)

    got, want = jax.jit(jax.grad(loss))(adapters), jax.jit(jax.grad(reference))(adapters)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max())


def test_of_an_nnx_model_with_a_regular_expression_and_rslora():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.a = awq_jax.nnx.Linear(K, N, use_bias=False, rngs=rngs)
            self.b = awq_jax.nnx.Linear(N, K, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.b(jax.nn.silu(self.a(x)))

    apply_fn, params = awq_jax.nnx.functional(Two(nnx.Rngs(0)))
    apply, adapters, frozen = lora.add(apply_fn, params, rank=4, alpha=6, targets="^a/", rslora=True)
    assert list(adapters) == ["a"]
    adapters = drawn(adapters)
    want = apply_fn(merged(params, adapters, 3.0), X)
    np.testing.assert_allclose(apply(adapters, frozen, X), want, atol=1e-4)


def test_where_scales_are_folded_the_same_factors_do_the_same(scanned):
    """Values and gradients of the model without them: trained on either, an adapter takes the same steps."""
    apply_fn, params, calib, _, _ = scanned
    rng = np.random.default_rng(2)
    scales = {g.name: np.exp(rng.normal(size=(*g.scan, g.channels))) for g in calib.plan.groups if g.absorbers}
    there, folded = fold.apply(calib.plan, params, scales), channel_scales(calib.plan, scales)
    assert folded["params/layers/up/kernel"].input.shape == (2, K)
    got = []
    for own, known in ((params, None), (there, folded)):
        apply, adapters, frozen = lora.add(apply_fn, own, rank=4, calib=calib, scales=known)
        adapters = drawn(adapters)
        run = jax.jit(jax.value_and_grad(lambda a, p, apply=apply: jnp.sum(apply(a, p, X) ** 2)))
        got.append(jax.tree.leaves(run(adapters, frozen)))
    for a, b in zip(*got, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-3 * np.abs(a).max())
    wrong = {"params/layers/up/kernel": awq_jax.report.FoldedScale(np.ones(K + 1, np.float32), None)}
    with pytest.raises(errors.ShapeError, match=r"up/kernel is 32 x 48, and has scales of shape \(33,\)"):
        lora.add(apply_fn, params, calib=calib, scales=wrong)


def test_the_correction_is_the_best_by_the_gram():
    """Against the closed form: what is left is the tail of the singular values of L^T E."""
    rng = np.random.default_rng(3)
    error, x = rng.normal(size=(12, 20)), rng.normal(size=(40, 12)) * np.exp(rng.normal(size=12))
    gram = x.T @ x / 40
    gram += 1e-9 * np.eye(12)
    a, b = weighted(error, gram, 3)
    left = error - a @ b
    singular = np.linalg.svd(np.linalg.cholesky(gram).T @ error, compute_uv=False)
    np.testing.assert_allclose(np.trace(left.T @ gram @ left), np.sum(singular[3:] ** 2), rtol=1e-3)
    plain = error - np.matmul(*weighted(error, None, 3))
    assert np.trace(plain.T @ gram @ plain) > 1.1 * np.trace(left.T @ gram @ left)


def test_starting_from_the_error_the_output_is_nearer_the_float_model(scanned):
    apply_fn, params, calib, packed, report = scanned
    original = lora.Original(params, report.scales)
    apply, adapters, frozen = lora.add(apply_fn, packed, rank=8, init="error", calib=calib, original=original)
    want = apply_fn(params, X)
    before = np.linalg.norm(awq_jax.bind(apply_fn)(packed, X) - want)
    assert np.linalg.norm(apply(adapters, frozen, X) - want) < 0.75 * before


def test_refusals(scanned):
    apply_fn, params, _, packed, _ = scanned
    for settings, says in [
        ({"rank": 0}, "rank must be"),
        ({"init": "pissa"}, "init must be one of"),
        ({"targets": "q_proj"}, "matches no weight"),
        ({"targets": "("}, "no regular expression"),
        ({"init": "error"}, "needs calib="),
        ({"remat": "block"}, "is for a model of"),
    ]:
        with pytest.raises(errors.ConfigError, match=says):
            lora.add(apply_fn, packed, **settings)
    with pytest.raises(errors.ConfigError, match="are not known: pass calib="):
        lora.add(apply_fn, params, targets="up/kernel")


def test_optax_trains_what_is_float_and_no_moments_are_made_for_the_rest(scanned):
    apply_fn, _, _, packed, _ = scanned
    run = awq_jax.bind(apply_fn)
    optimizer = optax.multi_transform(
        {"train": optax.adam(1e-2), "frozen": optax.set_to_zero()}, trainable.labels(packed)
    )
    state = optimizer.init(packed)
    floats = sum(a.size for a in jax.tree.leaves(trainable.split(packed)[0]))
    assert sum(a.size for a in jax.tree.leaves(state) if a.ndim) == 2 * floats

    def loss(p):
        return jnp.mean(run(p, X) ** 2)

    value, grads = jax.value_and_grad(loss, allow_int=True)(packed)
    updates, _ = optimizer.update(trainable.without_float0(grads, packed), state, packed)
    after = optax.apply_updates(packed, updates)
    assert loss(after) < value
    for path, leaf in paths.flatten(packed).items():
        if isinstance(leaf, QuantizedTensor):
            jax.tree.map(np.testing.assert_array_equal, leaf, paths.flatten(after)[path])
